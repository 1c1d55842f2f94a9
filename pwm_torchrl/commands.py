"""What the commands are called here: ``python launch/train.py`` in a checkout, ``pwm-train`` where one is installed.

Messages name a command as the user can type it. Imports nothing, so that every folder can use it.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["named", "typed"]


def typed(name: str) -> str:
    """A command as it is typed, ``"python launch/train.py"`` or ``"pwm-train"``; ``name`` is that of the script."""
    return f"python {named(name)}" if _scripts() else named(name)


def named(name: str) -> str:
    """A command in a sentence, ``"launch/train.py"`` or ``"pwm-train"``."""
    return f"launch/{name}.py" if _scripts() else f"pwm-{name.replace('_', '-')}"


def _scripts() -> bool:
    """Whether commands are scripts: there are some beside this package, and the user did not type another."""
    if sys.argv and Path(sys.argv[0]).name.startswith("pwm-"):
        return False
    return (Path(__file__).resolve().parents[1] / "launch" / "train.py").is_file()
