"""How far an import has come: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING

from pwm_torchrl.terminal import LINE_EVERY_S, has_terminal, say

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["ByteProgress"]


class ByteProgress(contextlib.AbstractContextManager["ByteProgress"]):
    """Shows on stderr how many of the bytes to read have been read.

    Args:
        total (int): bytes.
        enabled (bool): whether to show anything.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self.total, self.done = total, 0
        self.shown = time.monotonic()
        self.enabled = enabled
        self.bar: RichProgress | None = None
        self.what = ""
        if enabled and has_terminal(sys.stderr) and find_spec("rich"):
            from pwm_torchrl.display import counter

            self.bar = counter("B")
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def describe(self, what: str) -> None:
        """Say what is being read."""
        self.what = what
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.task, count)
        elif self.enabled and time.monotonic() - self.shown >= LINE_EVERY_S:
            self.shown = time.monotonic()
            self.say(f"{self.done / max(1, self.total):.0%} of {self.total / 2**30:.1f} GiB  {self.what}")

    def say(self, line: str) -> None:
        """A line beside the bar, if anything is shown."""
        if self.enabled:
            say(line, err=True)
