"""Runs a module as a program without looking for it in the working directory first; started as a script.

    python start.py MODULE [ARGUMENT ...]

``python -m`` puts the working directory before everything else, also before the copy of the code that a job was given:
a job that was started in a checkout would run the checkout's code of that moment. Here the copy comes first and the
working directory last, where what was not copied is still found.
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
