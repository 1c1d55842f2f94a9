"""What shows progress in this process: rich where there is a terminal and it is installed, plain lines elsewhere.

The only module that knows that rich is optional; :mod:`~pwm_torchrl.display` draws with it, and
:mod:`~pwm_torchrl.terminal` needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pwm_torchrl.terminal import STATE_VARIABLE, Lines, Progress, Screen, StateFile, has_terminal

try:
    from pwm_torchrl import display
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "rich":
        raise
    display = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from pwm_torchrl.display import Display

__all__ = ["counting", "drawn_here", "new_bar", "progress_here"]


def progress_here(enabled: bool) -> Progress:
    """What a run of this process reports to: shown on its terminal, or as lines; and in a file if one is asked for.

    Args:
        enabled (bool): whether to show anything.
    """
    if not enabled:
        return Progress()
    screens: list[Screen] = [drawn_here() or Lines()]
    if os.environ.get(STATE_VARIABLE):
        screens.append(StateFile(Path(os.environ[STATE_VARIABLE])))
    return Progress(screens)


def drawn_here() -> Display | None:
    """A display on stdout; ``None`` if that is no terminal, or without rich."""
    return display.Display() if display is not None and has_terminal(sys.stdout) else None


def new_bar(unit: str) -> Bar | None:
    """A bar on stderr, see :func:`pwm_torchrl.display.counter`; ``None`` if that is no terminal, or without rich."""
    return display.counter(unit) if display is not None and has_terminal(sys.stderr) else None


@contextlib.contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar for work of a known size, where there can be one.

    Yields:
        callable: advances the bar by a number of units.
    """
    bar = new_bar(unit)
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task(f"{unit}s", total=total)
        yield lambda count: bar.advance(task, count)
