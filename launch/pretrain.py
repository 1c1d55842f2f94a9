"""Pre-trains a world model on stored episodes: python launch/pretrain.py tasks=mt30 data.path=STORE."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout works without installation

from pwm_torchrl.launch.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
