"""Progress on a terminal, drawn by rich: two lines that stay where they are. Needs the extra ``launch``."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.text import Text

from pwm_torchrl.terminal import LEFT, RESULT, STEPS, State, text_fields

__all__ = ["Display", "SteadyConsole", "counter"]

_GAP = "  "
_MARGIN = 2  # columns left free, in which a terminal echoes ^C
_LEAST_BAR = 6
_PHASE_ROOM = 26  # columns kept for a phase's name, so that the bar's length does not change with it
_STYLES = {RESULT: "bold cyan", STEPS: "", LEFT: "bold"}  # of fields; of all others dim

Part = Text | ProgressBar


class SteadyConsole(Console):
    """A rich console that follows the terminal's size, wraps no lines, and leaves the cursor visible.

    rich takes ``COLUMNS`` for the width where a shell exports it; that is the width at the start. It also hides the
    cursor, and a process that is killed could not bring it back.

    Args:
        file (TextIO): the terminal.
        options: further ones of rich's console.
    """

    def __init__(self, file: TextIO, **options: Any) -> None:
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        plain = {"color_system": None} if os.environ.get("NO_COLOR") else {}
        super().__init__(
            file=file, **{"force_terminal": True, "highlight": False, "_environ": environ, **plain, **options}
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and leave it to the terminal to break long lines: paths can be copied from those."""
        super().print(*objects, **{"soft_wrap": True, **options})

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Display:
    """Shows a run's state in two lines at the bottom; what is printed meanwhile goes above them.

    The first line has the numbers, as many as fit; the second a bar, the epoch and, if it takes long, the phase.

    Args:
        console (SteadyConsole, optional): the terminal. Defaults to ``None``: stdout's.
    """

    def __init__(self, console: SteadyConsole | None = None) -> None:
        self.console = SteadyConsole(sys.stdout) if console is None else console
        self.live = Live(
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=console is None,
            redirect_stderr=console is None and sys.stderr.isatty(),
            get_renderable=lambda: self,
        )
        self.state: State | None = None
        self.now = 0.0
        self.drawn: list[int] = []  # lengths of the lines on the screen

    def show(self, state: State, now: float) -> None:
        self.state, self.now = state, now
        if not self.live.is_started:
            self.live.start()
        self._climb()
        self.live.refresh()

    def close(self, state: State | None = None, now: float = 0.0) -> None:
        if self.live.is_started:
            self._climb()
            self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - _MARGIN
        drawn: list[int] = []
        for make in (_numbers, _bar):
            parts = [] if self.state is None else make(self.state, self.now, width)
            if parts:
                if drawn:
                    yield Text("")
                drawn.append(sum((part.width or 0) if isinstance(part, ProgressBar) else len(part) for part in parts))
                yield from parts
        self.drawn = drawn

    def _climb(self) -> None:
        """Wipe away the rows that lines take beyond one each since the terminal became narrower and wrapped them."""
        width = max(1, self.console.width)
        rows = sum(-(-length // width) - 1 for length in self.drawn if length)
        if rows:
            wipe = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * rows
            self.console.control(Control(ControlType.CARRIAGE_RETURN, *wipe))


def _numbers(state: State, now: float, width: int) -> list[Part]:
    """The first line: fields in their order, without those of the highest ranks if they do not all fit."""
    fields = text_fields(state, now)
    while len(fields) > 1 and len(_GAP.join(text for text, _ in fields)) > width:
        fields.remove(max(fields, key=lambda each: each[1]))
    return _line([(text, _STYLES.get(rank, "dim")) for text, rank in fields], width)


def _bar(state: State, now: float, width: int) -> list[Part]:
    """The second line: bar, epoch, phase; where there is no room the bar goes first, then the epoch."""
    epoch = f"epoch {state.epoch}/{state.epochs}"
    words = [(epoch, "")] if state.epochs else []
    phase = state.phase_text(now)
    words += [(phase, "yellow")] if phase else []
    free = width - len(_GAP.join(text for text, _ in words))
    if len(words) > 1 and free < 0:
        del words[0]
    line = _line(words, width)
    length = min(free - len(_GAP), max(_LEAST_BAR, width - len(epoch) - 2 * len(_GAP) - _PHASE_ROOM))
    if not state.epochs or length < _LEAST_BAR:
        return line
    return [ProgressBar(total=state.epochs, completed=state.epoch, width=length), Text(_GAP, end=""), *line]


def _line(words: list[tuple[str, str]], width: int) -> list[Part]:
    """Words and their styles beside each other."""
    line = Text(_GAP, end="").join(Text(text, style, end="") for text, style in words)
    line.truncate(max(0, width))
    return [line] if words else []


def counter(unit: str) -> RichProgress:
    """A bar on stderr for work of a known size: bytes, or as many of ``unit``.

    Args:
        unit (str): "B" for bytes.
    """
    amount = DownloadColumn(binary_units=True) if unit == "B" else MofNCompleteColumn()
    return RichProgress(
        BarColumn(None),
        amount,
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=SteadyConsole(sys.stderr),
        transient=True,
        expand=True,
    )
