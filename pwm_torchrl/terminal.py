"""What a person sees of a run: lines, colours and its progress. Needs nothing but the standard library.

A run reports its phases, its epochs and their numbers to a :class:`Progress`, which passes them on to screens:
:class:`~pwm_torchrl.display.Display` if this process has a terminal, :class:`Lines` if it has none, and
:class:`StateFile` if another process owns the terminal and reads the file. :mod:`~pwm_torchrl.progress` chooses them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TextIO

from pwm_torchrl.files import replacing

__all__ = [
    "PROGRESS_LINE",
    "STATE_VARIABLE",
    "Lines",
    "Progress",
    "Screen",
    "State",
    "StateFile",
    "coloured",
    "has_terminal",
    "joined",
    "say",
    "say_after_interrupt",
    "text_fields",
    "warn",
]

#: Environment variable with the path of the file in which a job writes its :class:`State` for another process to show.
STATE_VARIABLE = "PWM_TORCHRL_PROGRESS_FILE"
#: The beginning of a progress line in a log: the time since the process started.
PROGRESS_LINE = re.compile(r"\[\d+:\d\d:\d\d\] ")
LINE_EVERY_S = 10.0
#: A phase is shown after this many seconds, because shorter ones would flicker.
LONG_S = 1.0
#: After this many seconds, a phase without a count also shows its duration.
TELL_TIME_S = 5.0
_TICK_S = 0.25
#: Ranks of the fields. If space is short, fields of high rank are left out first. Losses have the ranks above these.
RESULT, STEPS, LEFT, BEST, SPEED = range(5)
_RECENT = 50  # number of epochs from which speed and time left are computed

_COLOURS = {
    **dict.fromkeys(("ok", "finished"), "green"),
    **dict.fromkeys(("warning", "stopped", "held", "cancelled"), "yellow"),
    **dict.fromkeys(("problem", "error", "failed", "died", "memory", "storage"), "bold red"),
    **dict.fromkeys(("running", "queued"), "cyan"),
}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_WORD = re.compile("|".join(rf"\b{word}\b" for word in _COLOURS))


def say(text: str, *, err: bool = False) -> None:
    """Write a line to stdout, or to stderr."""
    stream = sys.stderr if err else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def warn(text: str) -> None:
    """Write a line to stderr. An error is ignored, because stderr may be a file on a full disk."""
    with contextlib.suppress(OSError):
        say(text, err=True)


def say_after_interrupt(text: str, *, err: bool = False) -> None:
    """Write a line after Ctrl-C. On a terminal without a display, it starts on a new line, below the ``^C``."""
    displayed = hasattr(sys.stdout, "rich_proxied_file")
    say(f"\n{text}" if has_terminal(sys.stdout) and not displayed else text, err=err)


def has_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which the cursor can be moved."""
    try:
        return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    except ValueError:  # closed
        return False


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 80 if it is unknown."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def coloured(text: str, *, err: bool = False) -> str:
    """``text`` with coloured states (ok, warning, failed, finished, ...).

    The text is unchanged if stdout (with ``err``, stderr) is not a terminal, ``NO_COLOR`` is set, or rich is missing.
    """
    if os.environ.get("NO_COLOR") or not has_terminal(sys.stderr if err else sys.stdout) or not find_spec("rich"):
        return text
    from rich.color import ColorSystem
    from rich.style import Style

    def paint(word: re.Match[str]) -> str:
        return Style.parse(_COLOURS[word[0]]).render(word[0], color_system=ColorSystem.STANDARD)

    return _WORD.sub(paint, text)


def joined(parts: Sequence[str]) -> str:
    """The parts in one line. On a terminal, they are wrapped between parts to its width."""
    gap = " · "
    if not has_terminal(sys.stdout):
        return gap.join(parts)
    width, lines = _columns(sys.stdout), [""]
    for part in parts:
        longer = f"{lines[-1]}{gap}{part}" if lines[-1] else part
        if lines[-1] and len(_ESCAPE.sub("", longer)) > width:
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


@dataclass(frozen=True)
class State:
    """What a run is doing. Times are values of ``time.monotonic``, which all processes of a machine share.

    Attributes:
        started (float): when the process started.
        epoch, epochs (int): epochs done and planned; ``epochs`` is 0 before training begins.
        steps, all_steps (int): environment steps done and planned; 0 if nothing is collected.
        values (dict): numbers to show, by name; ``return`` or ``validation`` is shown first.
        epoch_ended (float): when the newest epoch ended.
        epoch_s (float, optional): seconds per epoch, averaged over the newest epochs.
        speed (float, optional): environment steps per second, averaged over the newest epochs.
        phase (str): name of the current phase.
        phase_since (float): when the phase began.
        phase_done, phase_total (int): progress of the phase; ``phase_total`` is 0 if it is not counted.
    """

    started: float
    epoch: int = 0
    epochs: int = 0
    steps: int = 0
    all_steps: int = 0
    values: dict[str, float] = field(default_factory=dict)
    epoch_ended: float = 0.0
    epoch_s: float | None = None
    speed: float | None = None
    phase: str = ""
    phase_since: float = 0.0
    phase_done: int = 0
    phase_total: int = 0

    def left(self, now: float) -> float | None:
        """Estimated seconds to the end of the last epoch; ``None`` if the speed is unknown or training is over."""
        if self.epoch_s is None or self.epoch >= self.epochs:
            return None
        this_one = max(0.0, self.epoch_s - (now - self.epoch_ended))
        return this_one + self.epoch_s * (self.epochs - self.epoch - 1)

    def phase_text(self, now: float) -> str:
        """A long phase as text, such as ``fitting the model 120/500`` or ``planning memory 0:12``; else ``""``."""
        took = now - self.phase_since
        if not self.phase or took < LONG_S:
            return ""
        if self.phase_total:
            return f"{self.phase} {self.phase_done}/{self.phase_total}"
        return f"{self.phase} {_clock(took)}" if took >= TELL_TIME_S else self.phase


def text_fields(state: State, now: float) -> list[tuple[str, int]]:
    """The fields of a run's progress in the order of display, each with its rank.

    If there is no space for all, those of high rank are left out first.
    """
    values = dict(state.values)
    best = values.pop("best", None)
    fields = [(f"{name} {_number(values.pop(name))}", RESULT) for name in ("return", "validation") if name in values]
    if state.all_steps:
        fields.append((f"{_count(state.steps)}/{_count(state.all_steps)} env steps", STEPS))
    left = state.left(now)
    if left is not None:
        fields.append((f"{_clock(left)} left", LEFT))
    if best is not None:
        fields.append((f"best {_number(best)}", BEST))
    if state.speed is not None:
        fields.append((f"{_count(state.speed)} steps/s", SPEED))
    fields += [(f"{name} {_number(value)}", SPEED + 1 + place) for place, (name, value) in enumerate(values.items())]
    return fields


class Screen(Protocol):
    """Shows a run's progress."""

    def show(self, state: State, now: float) -> None:
        """Show a state, several times a second."""

    def close(self, state: State, now: float) -> None:
        """Show the last state and stop."""


class Lines:
    """Writes a plain line every ten seconds, and one for the last epoch.

    Args:
        write (callable, optional): writes a line. Defaults to :func:`say`.
    """

    def __init__(self, write: Callable[[str], None] = say) -> None:
        self.write = write
        self.shown: float | None = None
        self.epoch = -1  # epoch of the newest line

    def show(self, state: State, now: float) -> None:
        if self.shown is None:
            self.shown = now
        if now - self.shown >= LINE_EVERY_S:
            self._line(state, now)

    def close(self, state: State, now: float) -> None:
        if 0 < state.epochs == state.epoch != self.epoch:
            self._line(state, now)

    def _line(self, state: State, now: float) -> None:
        self.shown, self.epoch = now, state.epoch
        fields = text_fields(state, now)
        texts = [text for text, rank in fields if rank < BEST]
        texts += [f"epoch {state.epoch}/{state.epochs}"] if state.epochs else []
        texts += [text for text in (state.phase_text(now),) if text]
        texts += [text for text, rank in fields if rank >= BEST]
        # A full disk under the log must not end the run. The code that writes the run's files reports it.
        with contextlib.suppress(OSError):
            self.write(f"[{_clock(now - state.started, hours=True)}] " + ", ".join(texts))


class StateFile:
    """Writes a run's state atomically to a file, for another process to show.

    Args:
        path (Path): the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: State | None = None

    def show(self, state: State, now: float) -> None:
        if state == self.kept:
            return
        self.kept = state
        # Errors are ignored for the same reason as in Lines. Each attempt has a folder of its own: nothing to sweep.
        with contextlib.suppress(OSError), replacing(self.path, sweep=False) as draft:
            draft.write_text(json.dumps(asdict(state)), encoding="utf-8")

    def close(self, state: State, now: float) -> None:
        self.show(state, now)

    @staticmethod
    def read(path: Path) -> State | None:
        """The state in a file; ``None`` if the file does not exist yet."""
        try:
            return State(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


class Progress:
    """Receives a run's progress. A thread updates the screens, so reports are cheap and long phases stay up to date.

    Args:
        screens (sequence of Screen): show the progress. Defaults to none.
        clock (callable): returns the time. Defaults to ``time.monotonic``.
        ticking (bool): whether a thread updates the screens; if not, the caller calls :meth:`tick`. Defaults to
            ``True``.
    """

    def __init__(
        self, screens: Sequence[Screen] = (), clock: Callable[[], float] = time.monotonic, ticking: bool = True
    ) -> None:
        self.screens, self.clock, self.ticking = tuple(screens), clock, ticking and bool(screens)
        self.state = State(started=clock())
        self._ends: deque[tuple[float, int, int]] = deque(maxlen=_RECENT)  # time, epoch and steps at epoch ends
        self._begun: dict[str, float] = {}  # when phases with ``pieces`` first began
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        self._go_on()
        return self

    def __exit__(self, *error: object) -> None:
        self._pause()
        state, now = self.state, self.clock()
        for screen in self.screens:
            screen.close(state, now)

    def begin(self, epochs: int, epoch: int, steps: int, all_steps: int, values: dict[str, float]) -> None:
        """Report that training begins, or continues after ``epoch`` epochs."""
        self.state = replace(
            self.state, epochs=epochs, epoch=epoch, steps=steps, all_steps=all_steps, values=values,
            epoch_ended=self.clock(),
        )  # fmt: skip

    def epoch(self, epoch: int, steps: int, values: dict[str, float], *, typical: bool = True) -> None:
        """Report the end of an epoch. A value is shown until it is replaced.

        Args:
            epoch (int): number of epochs done.
            steps (int): environment steps done.
            values (dict): numbers to show.
            typical (bool): whether later epochs take about as long as the next one, so that the time left can be
                estimated; ``False`` while a run only collects. Defaults to ``True``.
        """
        now = self.clock()
        if typical:
            self._ends.append((now, epoch, steps))
        first, first_epoch, first_steps = self._ends[0] if self._ends else (now, epoch, steps)
        took = now - first
        self.state = replace(
            self.state, epoch=epoch, steps=steps, values={**self.state.values, **values}, epoch_ended=now,
            epoch_s=took / (epoch - first_epoch) if epoch > first_epoch else None,
            speed=(steps - first_steps) / took if steps > first_steps and took > 0 else None,
        )  # fmt: skip

    @contextlib.contextmanager
    def phase(
        self, name: str, total: int = 0, done: int = 0, *, pieces: bool = False, forks: bool = False
    ) -> Iterator[Callable[[], None]]:
        """Report that the run is in a phase inside the block. Yields a function that counts one of ``total``.

        Args:
            name (str): name of the phase, such as "evaluating".
            total (int): number of items in the phase. Defaults to 0: not counted.
            done (int): number of items already done. Defaults to 0.
            pieces (bool): whether the phase continues an earlier one of the same name. Defaults to ``False``.
            forks (bool): whether the phase may fork processes. The thread that updates the screens is stopped
                meanwhile, because a process with threads should not fork. Defaults to ``False``.
        """
        before, now = self.state, self.clock()
        since = self._begun.setdefault(name, now) if pieces else now
        ticked = self._thread is not None
        if forks:
            self._pause()
            since = now - LONG_S  # shown at once
        self.state = replace(before, phase=name, phase_since=since, phase_done=done, phase_total=total)
        if forks:
            self.tick()
        try:
            yield self._count
        finally:
            self.state = replace(
                self.state, phase=before.phase, phase_since=before.phase_since, phase_done=before.phase_done,
                phase_total=before.phase_total,
            )  # fmt: skip
            if forks and ticked:
                self._go_on()

    def tick(self) -> None:
        """Show the current state."""
        state, now = self.state, self.clock()
        for screen in self.screens:
            screen.show(state, now)

    def _count(self) -> None:
        self.state = replace(self.state, phase_done=self.state.phase_done + 1)

    def _go_on(self) -> None:
        if self.ticking and self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._tick_on, name="progress", daemon=True)
            self._thread.start()

    def _pause(self) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _tick_on(self) -> None:
        self.tick()
        while not self._over.wait(_TICK_S):
            self.tick()


def _clock(seconds: float, *, hours: bool = False) -> str:
    """A duration such as ``"1:05"`` or ``"2:01:05"``; with ``hours``, always in the second form."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour or hours else f"{minute}:{second:02d}"


def _number(value: float) -> str:
    """A number with one decimal if it is large, with three digits if it is small."""
    return f"{value:,.1f}" if 10 <= abs(value) < 1e6 else f"{value:.3g}"


def _count(value: float) -> str:
    """A count such as ``"950"``, ``"12.3k"`` or ``"1.05M"``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}"
