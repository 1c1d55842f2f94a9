"""Runs a module as a program, without searching the working directory first; started as a script.

    python start.py MODULE [ARGUMENT ...]

``python -m`` puts the working directory first in the search path, before the job's copy of the code, so a job started
in a checkout would run the checkout's current code. Here the copy comes first. The working directory comes last, so
that modules that were not copied are still found.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path[0:1] = []  # this script's own folder
    sys.path.append(os.getcwd())
    sys.argv[0:1] = []
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
