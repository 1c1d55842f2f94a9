"""Names of the commands as the user can type them: ``python launch/train.py`` in a checkout, ``pwm train`` otherwise.

Messages use these names. This module imports nothing of the package, so every folder can use it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["named", "typed", "typed_here", "what_next"]

#: For each mode of a run: the scripts that use such a run, their arguments (RUN is its directory), and the result.
_USES = {
    "pretrain": (
        ("submit", "experiment=extract task=all world_model=RUN data.path=STORE", "a policy for each task"),
        ("world_model", "show RUN", "its tasks and dimensions"),
    ),
    "other": (
        ("evaluate", "RUN", "deterministic episodes in the real environment"),
        ("report", "RUN", "tables and curves"),
    ),
}


def typed(name: str) -> str:
    """A command line, ``"python launch/train.py"`` or ``"pwm train"``; ``name`` is the script's name."""
    return f"python {named(name)}" if _scripts() else named(name)


def named(name: str) -> str:
    """A command's name for use in a sentence, ``"launch/train.py"`` or ``"pwm train"``."""
    return f"launch/{name}.py" if _scripts() else f"pwm {name.replace('_', '-')}"


def typed_here(name: str) -> str:
    """A command line for the current shell, such as ``.venv/bin/python launch/train.py``.

    The interpreter's path is given if ``python`` is another interpreter in that shell. Use this in messages on the
    terminal, and :func:`typed` in files.
    """
    return f"{_interpreter()} {named(name)}" if _scripts() else named(name)


def what_next(mode: str) -> list[tuple[str, str, str]]:
    """What to do next with a run of a mode: scripts, their arguments (RUN is the run's directory), and the result."""
    return list(_USES.get(mode, _USES["other"]))


def _interpreter() -> str:
    """``python`` if the shell finds this interpreter by that name, else its quoted path."""
    found = shutil.which("python")
    if found is not None and os.path.samefile(Path(found).parent, Path(sys.executable).parent):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith(os.pardir) else relative)


def _scripts() -> bool:
    """Whether commands are scripts: ``launch/`` exists beside this package, and the user did not type ``pwm``."""
    if sys.argv and Path(sys.argv[0]).name == "pwm":
        return False
    return (Path(__file__).resolve().parents[1] / "launch" / "train.py").is_file()
