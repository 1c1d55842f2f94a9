"""Trains as a job of its own and shows its progress: python launch/submit.py model=flow_v2."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout works without installation

from pwm_torchrl.launch.submit import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
