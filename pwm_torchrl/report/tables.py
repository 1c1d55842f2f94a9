"""The tables of a report, as text for the console and as cells for the page."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pwm_torchrl.memory.readings import format_bytes
from pwm_torchrl.report.collect import RunReport
from pwm_torchrl.report.statistics import Group, average
from pwm_torchrl.terminal import coloured

__all__ = [
    "Table",
    "bytes_text",
    "duration",
    "fit_names",
    "group_table",
    "memory_table",
    "number_text",
    "reasons_text",
    "run_table",
]

_BLANK = ("-", "")
_COUNTS = ("restarts", "failed", "open")
_NAMES = ("model", "size", "env")
_HOW = ("status", "restarts", "time", "host", "GPU")
_TIME = re.compile(r"_\d{8}-\d{6}(_\d+)?$")  # end of a run directory's generated name
_NUMBERS = frozenset(
    [
        *("seed", "peak", "final", "random", "epochs", "time", "host", "GPU", "steps", "hours", "GPU-hours"),
        *("epoch", "return", "± std", "success", "score", "95 % interval"),
        *("finished", "failed", "open", "episodes", "transitions", "length", "O", "A", "mean return"),
    ]
)


@dataclass
class Table:
    """Cells of text under a head.

    Attributes:
        wide: columns of long text, which the console leaves out.
        narrow: columns that leave the lines where a terminal is too narrow, the first to go first.
        below: those of them that are then shown on lines of their own, with the words before their cells; the others
            are left out.
    """

    head: list[str]
    rows: list[list[str]]
    wide: frozenset[str] = frozenset()
    narrow: Sequence[str] = ()
    below: Mapping[str, str] = field(default_factory=dict)

    def right(self, column: str) -> bool:
        """Whether a column holds numbers, which line up at their ends."""
        return column in _NUMBERS or column.split()[-1] in ("measured", "predicted", "share")

    def text(self, width: int | None = None) -> str:
        """Aligned lines, on a terminal with the runs' states in colour.

        Args:
            width: columns to make do with, if that can be done. Defaults to ``None``: as many as they take.
        """
        shown, below, gone = self._fitted(width)
        at = [self.head.index(name) for name in shown]
        rows = [[row[i] for i in at] for row in (self.head, *self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(at))]
        sides = [str.rjust if self.right(name) else str.ljust for name in shown]
        aligned = [[side(cell, width) for cell, width, side in zip(row, widths, sides)] for row in rows]
        if "status" in shown:
            place = shown.index("status")
            for cells in aligned[1:]:
                cells[place] = coloured(cells[place])
        head, *body = ["  ".join(cells).rstrip() for cells in aligned]
        lines = [head, "  ".join("-" * width for width in widths)]
        for line, row in zip(body, self.rows):
            lines.append(line)
            for name in below:
                cell = row[self.head.index(name)]
                if cell not in _BLANK:
                    words = _wrapped(self.below[name] + cell, width or 0)
                    lines += [coloured(line) for line in words] if name == "status" else words
        if gone:
            lines += _wrapped(f"(no room for {', '.join(gone)})", width or 0)
        return "\n".join(lines)

    def _fitted(self, width: int | None) -> tuple[list[str], list[str], list[str]]:
        """Columns that are shown, those below their rows in the order of the head, and those left out."""
        shown = [name for name in self.head if name not in self.wide]
        if width is None or self._width(shown) <= width:
            return shown, [], []
        shown = [name for name in shown if not self.blank(name)]
        below: list[str] = []
        gone: list[str] = []
        for name in self.narrow:
            if name in shown and self._width(shown) > width:
                shown.remove(name)
                (below if name in self.below else gone).append(name)
        return shown, sorted(below, key=self.head.index), gone

    def _width(self, names: Sequence[str]) -> int:
        columns = [self.head.index(name) for name in names]
        return sum(max(len(row[i]) for row in (self.head, *self.rows)) + 2 for i in columns) - 2

    def blank(self, name: str) -> bool:
        """Whether a column says nothing in any row."""
        nothing = (*_BLANK, "0") if name in _COUNTS else _BLANK
        return bool(self.rows) and all(row[self.head.index(name)] in nothing for row in self.rows)


def run_table(runs: Sequence[RunReport]) -> Table:
    """One row per run."""
    head = [*_NAMES, "seed", "peak", "final", "random", "epochs", *_HOW, "run"]
    rows = []
    for run in runs:
        rows.append([_text(value) for value in (run.model, run.size, run.env, run.seed)])
        rows[-1] += [number_text(value) for value in (run.peak_return, run.final_return, run.random_return)]
        rows[-1] += [f"{run.epochs_done}/{_text(run.epochs_planned)}", run.status, reasons_text(run.restarts)]
        rows[-1] += [duration(run.wall_clock_s), bytes_text(run.host_bytes), bytes_text(run.device_bytes or None)]
        rows[-1] += [run.name, run.last_error or ""]
    narrow = ("run", "GPU", "host", "time", "restarts", "random", "peak")
    return Table([*head, "last error"], rows, frozenset({"last error"}), narrow, {"run": ""})


def group_table(groups: Sequence[Group]) -> Table:
    """One row per model, size and environment: means and standard deviations over the seeds."""
    head = [*_NAMES, "seeds", "peak", "final", "epochs", *_HOW]
    rows = []
    for group in groups:
        runs = group.runs
        planned = {run.epochs_planned for run in runs}
        plan = _text(planned.pop()) if len(planned) == 1 else "?"
        restarts: Counter[str] = sum((run.restarts for run in runs), Counter())
        statuses = Counter(run.status for run in runs)
        time = average([run.wall_clock_s for run in runs])
        rows.append([_text(value) for value in (group.model, group.size, group.env)])
        rows[-1] += [seeds_text([run.seed for run in runs])]
        rows[-1] += [_spread([run.peak_return for run in runs]), _spread([run.final_return for run in runs])]
        rows[-1] += [f"{_range([run.epochs_done for run in runs])}/{plan}"]
        rows[-1] += [", ".join(f"{n} {status}" for status, n in statuses.most_common()), reasons_text(restarts)]
        rows[-1] += [duration(None if time is None else time[0])]
        rows[-1] += [_most_bytes(run.host_bytes for run in runs), _most_bytes(run.device_bytes for run in runs)]
    if any(group.settings for group in groups):
        head.append("settings")
        for row, group in zip(rows, groups):
            row.append(group.settings)
    return Table(
        head,
        rows,
        narrow=("settings", "status", "GPU", "host", "time", "restarts", "peak", "epochs"),
        below={"settings": "", "status": ""},
    )


def memory_table(runs: Sequence[RunReport]) -> Table:
    """Measured peaks beside the plan's predictions, one row per run that has a plan."""
    places = {"host": [(run.host_bytes, run.host_planned) for run in runs]}
    places["GPU"] = [(run.device_bytes, run.device_planned) for run in runs]
    places = {place: pairs for place, pairs in places.items() if any(planned for _, planned in pairs)}
    head = [f"{place} {what}" for place in places for what in ("measured", "predicted", "share")]
    rows = []
    for run, *pairs in zip(runs, *places.values()):
        cells = []
        for measured, planned in pairs:
            share = f"{measured / planned:.0%}" if measured and planned else "-"
            cells += [bytes_text(measured or None), bytes_text(planned), share]
        rows += [[run.name, *cells]] if any(planned for _, planned in pairs) else []
    return Table(["run", *head], rows, narrow=("run",), below={"run": ""})


def fit_names(names: Sequence[str], width: int) -> list[str]:
    """Names of runs in at most ``width`` columns, if they can still be told apart then; else as they are.

    First the time at the end of a generated name goes, then its middle.
    """

    def fit(candidates: list[str]) -> bool:
        return max(map(len, candidates), default=0) <= width and len(set(candidates)) == len(candidates)

    timeless = [_TIME.sub("", name) for name in names]
    tail = max(0, (width - 1) * 2 // 3)
    cut = [f"{name[: width - 1 - tail]}…{name[-tail:]}" if len(name) > width > 1 else name for name in names]
    return next((candidates for candidates in (list(names), timeless, cut) if fit(candidates)), list(names))


def reasons_text(restarts: Counter[str]) -> str:
    """``"3: 2 timeout, 1 memory"``; ``"0"`` without any."""
    names = {reason: reason.replace("start_up", "start-up").replace("_", " ") for reason in restarts}
    words = [f"{count} {names[reason]}" for reason, count in restarts.most_common()]
    if len(words) == 1:
        words = list(names.values())
    return f"{restarts.total()}: {', '.join(words)}" if words else "0"


def seeds_text(seeds: Sequence[int | None]) -> str:
    """Number and values: ``"3: 0-2"``, ``"2: 0, 7"``."""
    known = sorted({seed for seed in seeds if seed is not None})
    parts: list[list[int]] = []
    for seed in known:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    words = [f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"{len(seeds)}: {', '.join(words)}" if words else str(len(seeds))


def number_text(value: Any) -> str:
    """Four digits or one decimal, ``"-"`` for what is not known."""
    return f"{value:.1f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def bytes_text(count: float | None) -> str:
    """Bytes in words, ``"-"`` for what is not known."""
    return "-" if count is None else format_bytes(count)


def duration(seconds: float | None) -> str:
    """``"45 s"``, ``"1 min 43 s"``, ``"2 h 05 min"``, ``"3 d 02 h"``."""
    if seconds is None:
        return "-"
    for unit, name, part, parts in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if round(seconds / part) * part >= unit:
            whole, rest = divmod(round(seconds / part), unit // part)
            return f"{whole} {name} {rest:02d} {parts}"
    return f"{round(seconds)} s"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 20),
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _spread(values: Sequence[float | None]) -> str:
    known = average(values)
    if known is None:
        return "-"
    mean, spread, count = known
    text = f"{mean:.1f}" if count == 1 else f"{mean:.1f} ± {spread:.1f}"
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _most_bytes(values: Iterable[float | None]) -> str:
    return bytes_text(max((value for value in values if value), default=None))


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
