"""Progress on a terminal: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

#: Set by a launcher that shows a job's output: ``bar`` if it has a terminal, else ``lines``.
VARIABLE = "PWM_TORCHRL_PROGRESS"
LINE_EVERY_S = 10.0


class Progress:
    """Shows epochs done, returns, losses, agent steps per second and the time left.

    Args:
        total (int): epochs planned.
        done (int): epochs done before.
        steps_per_epoch (int): agent steps of one epoch, 0 where there are none.
        enabled (bool): whether to show anything.
    """

    def __init__(self, total: int, done: int, steps_per_epoch: int, enabled: bool) -> None:
        self.total, self.first, self.done = total, done, done
        self.steps_per_epoch = steps_per_epoch
        self.started = self.shown = time.monotonic()
        self.values: dict[str, float] = {}
        wanted = os.environ.get(VARIABLE) or ("bar" if sys.stderr.isatty() else "lines")
        self.bar = None
        self.lines = enabled and wanted == "lines"
        if enabled and wanted == "bar":
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=total,
                initial=done,
                unit="epoch",
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def update(self, epoch: int, values: dict[str, float]) -> None:
        """Show an epoch's numbers; a value stays until it is replaced."""
        self.values.update(values)
        advance, self.done = epoch - self.done, epoch
        if self.bar is not None:
            self.bar.set_postfix_str(self._text(), refresh=False)
            self.bar.update(advance)
        elif self.lines:
            now = time.monotonic()
            if now - self.shown >= LINE_EVERY_S or epoch == self.total:
                self.shown = now
                rate = (now - self.started) / max(1, self.done - self.first)
                left = _clock(rate * (self.total - self.done))
                say(f"epoch {epoch}/{self.total}  {self._text()}  {left} left")

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self.bar is not None:
            self.bar.close()

    def _text(self) -> str:
        elapsed = max(1e-9, time.monotonic() - self.started)
        speed = (self.done - self.first) * self.steps_per_epoch / elapsed
        shown = [f"{name} {value:.4g}" for name, value in self.values.items()]
        return ", ".join([*shown, *([f"{speed:.0f} steps/s"] if self.steps_per_epoch else [])])


@contextlib.contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for work of a known size, if there is a terminal; gives a function to advance it."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, dynamic_ncols=True) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def say(text: str) -> None:
    """A line for whoever follows the run."""
    print(text, flush=True)  # noqa: T201 - the one place that prints


def warn(text: str) -> None:
    """A line on stderr, as far as that can be written to: it may be a file on the disk that is full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
