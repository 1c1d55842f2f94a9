"""World models as files: python launch/world_model.py import CHECKPOINT FOLDER --tasks mt30."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout works without installation

from pwm_torchrl.launch.world_model import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
