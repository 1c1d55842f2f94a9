"""The tables of a report, as text for the console and as cells for the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pwm_torchrl.launch.reporting.aggregate import Group, average
from pwm_torchrl.launch.reporting.collect import RunReport
from pwm_torchrl.memory.readings import format_bytes
from pwm_torchrl.terminal import coloured

__all__ = [
    "Table",
    "bytes_text",
    "duration",
    "group_table",
    "memory_table",
    "number_text",
    "reasons_text",
    "run_table",
]

_NAMES = ("model", "size", "env")
_HOW = ("status", "restarts", "time", "host", "GPU")
_NUMBERS = frozenset(
    [
        *("seed", "peak", "final", "random", "epochs", "time", "host", "GPU", "steps", "hours", "GPU-hours"),
        *("finished", "failed", "open", "episodes", "transitions", "length", "O", "A", "mean return"),
    ]
)


@dataclass
class Table:
    """Cells of text under a head.

    Attributes:
        wide: columns of long text, which the console leaves out.
    """

    head: list[str]
    rows: list[list[str]]
    wide: frozenset[str] = frozenset()

    def right(self, column: str) -> bool:
        """Whether a column holds numbers, which line up at their ends."""
        return column in _NUMBERS or column.split()[-1] in ("measured", "predicted", "share")

    def text(self) -> str:
        """Aligned lines, on a terminal with the runs' states in colour."""
        kept = [i for i, name in enumerate(self.head) if name not in self.wide]
        rows = [[row[i] for i in kept] for row in (self.head, *self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(kept))]
        sides = [str.rjust if self.right(name) else str.ljust for name in rows[0]]
        aligned = [[side(cell, width) for cell, width, side in zip(row, widths, sides)] for row in rows]
        if "status" in rows[0]:
            place = rows[0].index("status")
            for cells in aligned[1:]:
                cells[place] = coloured(cells[place])
        lines = ["  ".join(cells).rstrip() for cells in aligned]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


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
    return Table([*head, "last error"], rows, frozenset({"last error"}))


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
    return Table(head, rows)


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
    return Table(["run", *head], rows)


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
