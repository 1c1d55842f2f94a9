"""Checks this machine and its SLURM for training: python launch/doctor.py [--draft NAME]."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there under python -P
from _start import start

if __name__ == "__main__":
    sys.exit(start("doctor"))
