"""Shows how much memory a run needs, and why: python launch/plan.py model=flow_v3 size=48m cluster=l40s."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there under python -P
from _start import start

if __name__ == "__main__":
    sys.exit(start("plan"))
