"""What the commands are called here: ``python launch/train.py`` in a checkout, ``pwm train`` where it is installed.

Messages name a command as the user can type it. Imports nothing, so that every folder can use it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["named", "typed", "typed_here", "what_next"]

#: By a run's mode: the scripts that use it, their words with RUN for its directory, and what comes of it.
_USES = {
    "pretrain": (
        ("submit", "experiment=extract task=all world_model=RUN data.path=STORE", "a policy for each task"),
        ("world_model", "show RUN", "what it is"),
    ),
    "other": (
        ("evaluate", "RUN", "deterministic episodes in the real environment"),
        ("report", "RUN", "tables and curves"),
    ),
}


def typed(name: str) -> str:
    """A command as it is typed, ``"python launch/train.py"`` or ``"pwm train"``; ``name`` is that of the script."""
    return f"python {named(name)}" if _scripts() else named(name)


def named(name: str) -> str:
    """A command in a sentence, ``"launch/train.py"`` or ``"pwm train"``."""
    return f"launch/{name}.py" if _scripts() else f"pwm {name.replace('_', '-')}"


def typed_here(name: str) -> str:
    """A command for the shell that this was started from: ``.venv/bin/python launch/train.py`` where no environment is
    active there, or another.

    Of use in messages that are read at once; in files, :func:`typed` is.
    """
    return f"{_interpreter()} {named(name)}" if _scripts() else named(name)


def what_next(mode: str) -> list[tuple[str, str, str]]:
    """What is done with a run of a mode: scripts, their words with RUN for its directory, and what comes of it."""
    return list(_USES.get(mode, _USES["other"]))


def _interpreter() -> str:
    """``python`` if the shell finds this interpreter by that name, else its path, quoted."""
    found = shutil.which("python")
    if found is not None and os.path.samefile(Path(found).parent, Path(sys.executable).parent):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith(os.pardir) else relative)


def _scripts() -> bool:
    """Whether commands are scripts: there are some beside this package, and the user did not type another."""
    if sys.argv and Path(sys.argv[0]).name == "pwm":
        return False
    return (Path(__file__).resolve().parents[1] / "launch" / "train.py").is_file()
