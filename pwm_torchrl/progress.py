"""Chooses how this process shows progress: with rich on a terminal if it is installed, else as plain lines.

Only this module handles a missing rich. :mod:`~pwm_torchrl.display` draws with rich, and :mod:`~pwm_torchrl.terminal`
needs nothing but the standard library.
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
    """The object to which a run in this process reports: it shows progress on the terminal, or as lines.

    The state is also written to the file that the environment variable ``STATE_VARIABLE`` names, if it is set.

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
    """A display on stdout; ``None`` if stdout is not a terminal or rich is missing."""
    return display.Display() if display is not None and has_terminal(sys.stdout) else None


def new_bar(unit: str) -> Bar | None:
    """A progress bar on stderr; ``None`` if stderr is not a terminal or rich is missing."""
    return display.counter(unit) if display is not None and has_terminal(sys.stderr) else None


@contextlib.contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar for work of a known size, if :func:`new_bar` gives one.

    Yields:
        callable: takes a number of units and advances the bar by it.
    """
    bar = new_bar(unit)
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task(f"{unit}s", total=total)
        yield lambda count: bar.advance(task, count)
