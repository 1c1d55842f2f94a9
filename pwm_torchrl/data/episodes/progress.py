"""How far an import has come: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType

from pwm_torchrl.errors import MissingLibraryError

__all__ = ["ByteProgress"]

_LINE_EVERY_S = 10.0


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
        self.bar = None
        self.what = ""
        if enabled and sys.stderr.isatty():
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise MissingLibraryError("the progress bar needs tqdm: pip install 'pwm-torchrl[launch]'") from error
            self.bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def describe(self, what: str) -> None:
        """Say what is being read."""
        self.what = what
        if self.bar is not None:
            self.bar.set_description(what)

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.shown >= _LINE_EVERY_S:
            self.shown = time.monotonic()
            self.say(f"{self.done / max(1, self.total):.0%} of {self.total / 2**30:.1f} GiB  {self.what}")

    def say(self, line: str) -> None:
        """A line beside the bar, if anything is shown."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.enabled:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
