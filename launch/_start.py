"""What every script of this folder begins with: can this Python run them? If not, one sentence says what to type.

Imports nothing of ours before that is known, and keeps to words that Python 2.7 reads.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

#: What the commands cannot start without. Other libraries are missed where they are used.
NEEDED = ("torch", "tensordict", "torchrl", "hydra", "omegaconf")


def start(name):
    """Runs a command with the words of the command line; returns the exit code."""
    # A checkout works without installation; this folder's plan.py, data.py and so on must not pass for libraries.
    sys.path[:] = [ROOT] + [path for path in sys.path if os.path.abspath(path) != HERE]
    problem = unfit()
    if problem:
        sys.stderr.write("error: " + problem + ": " + remedy() + "\n")
        return 2
    from pwm_torchrl.cli.entry import run_command

    return run_command(name)


def unfit():
    """Why this Python cannot run the commands; an empty string if it can."""
    version = ".".join(str(number) for number in sys.version_info[:2])
    if sys.version_info < (3, 10):
        return "this is Python " + version + " (" + sys.executable + "), and 3.10 or newer is needed"
    import importlib.util

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return "Python " + version + " (" + sys.executable + ") has no " + ", ".join(missing)


def remedy():
    """What to type so that the commands run."""
    folder = os.path.join(ROOT, ".venv")
    activate = os.path.join(folder, "bin", "activate")
    if os.path.isfile(activate) and os.path.realpath(sys.prefix) != os.path.realpath(folder):
        return "activate the environment first: source " + shorter(activate)
    where = shorter(ROOT)
    make = "type `make run`" if where == "." else "type `make -C " + where + " run`"
    if sys.version_info < (3, 10):
        return make + ", which sets up .venv"
    return make + ", which sets up .venv, or: pip install -e '" + where + "[gym,launch]'"


def shorter(path):
    """A path as seen from the working directory, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path
