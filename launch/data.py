"""Offline data: python launch/data.py import|inspect|generate ...."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout works without installation

from pwm_torchrl.launch.data import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
