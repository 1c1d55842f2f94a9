"""Tables of text, formatted for a terminal's width or used cell by cell by the HTML page. Does not import pandas."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pwm_torchrl.memory.readings import format_bytes
from pwm_torchrl.terminal import coloured

__all__ = [
    "Table",
    "bytes_text",
    "duration",
    "fit_names",
    "number_text",
]

_BLANK = ("-", "")
_COUNTS = ("restarts", "failed", "open")
_TIME = re.compile(r"_\d{8}-\d{6}(_\d+)?$")  # time at the end of a generated run directory name
_NUMBERS = frozenset(
    [
        *("seed", "peak", "final", "random", "epochs", "time", "host", "GPU", "steps", "hours", "GPU-hours"),
        *("epoch", "return", "± std", "success", "score", "95 % interval"),
        *("finished", "failed", "open", "episodes", "transitions", "length", "O", "A", "mean return"),
    ]
)


@dataclass
class Table:
    """Rows of text cells.

    Attributes:
        wide: columns of long text, which are not printed on a terminal.
        narrow: columns that may be dropped on a narrow terminal, in the order in which they are dropped.
        below: dropped columns that are printed on separate lines below the row instead of omitted, each with the text
            that precedes its cell.
        links: columns that only the page has: for each row, link texts and addresses.
        keys: by column, the sort key of each row on the page. Defaults to the cells' text.
    """

    head: list[str]
    rows: list[list[str]]
    wide: frozenset[str] = frozenset()
    narrow: Sequence[str] = ()
    below: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Sequence[Sequence[tuple[str, str]]]] = field(default_factory=dict)
    keys: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def right(self, column: str) -> bool:
        """Whether a column contains numbers, which are right-aligned."""
        return column in _NUMBERS or column.split()[-1] in ("measured", "predicted", "share", "MSE", "NMSE")

    def text(self, width: int | None = None) -> str:
        """Aligned lines; on a terminal, statuses are coloured.

        Args:
            width: maximum width in terminal columns, if possible. Defaults to ``None``: no limit.
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
            lines += _wrapped(f"(too narrow to show {', '.join(gone)})", width or 0)
        return "\n".join(lines)

    def _fitted(self, width: int | None) -> tuple[list[str], list[str], list[str]]:
        """Columns printed in the row, columns printed below it, and omitted columns."""
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
        """Whether a column is empty in every row."""
        nothing = (*_BLANK, "0") if name in _COUNTS else _BLANK
        return bool(self.rows) and all(row[self.head.index(name)] in nothing for row in self.rows)


def fit_names(names: Sequence[str], width: int) -> list[str]:
    """Shorten names of runs to at most ``width`` characters if they remain distinct; otherwise return them unchanged.

    The time at the end of a generated name is cut first, then the middle of the name.
    """

    def fit(candidates: list[str]) -> bool:
        return max(map(len, candidates), default=0) <= width and len(set(candidates)) == len(candidates)

    timeless = [_TIME.sub("", name) for name in names]
    tail = max(0, (width - 1) * 2 // 3)
    cut = [f"{name[: width - 1 - tail]}…{name[-tail:]}" if len(name) > width > 1 else name for name in names]
    return next((candidates for candidates in (list(names), timeless, cut) if fit(candidates)), list(names))


def number_text(value: Any) -> str:
    """A number with one decimal, ``"-"`` if it is unknown."""
    return f"{value:.1f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def bytes_text(count: float | None) -> str:
    """An amount of memory such as ``"3 GiB"``, ``"-"`` if it is unknown."""
    return "-" if count is None else format_bytes(count)


def duration(seconds: float | None) -> str:
    """A duration: ``"45 s"``, ``"1 min 43 s"``, ``"2 h 05 min"``, ``"3 d 02 h"``; ``"-"`` if it is unknown."""
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
