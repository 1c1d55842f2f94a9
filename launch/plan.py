"""What a run will need of memory, and why: python launch/plan.py model=flow_v3 size=48m cluster=l40s."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout works without installation

from pwm_torchrl.launch.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
