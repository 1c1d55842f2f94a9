"""``metrics.csv``: written a row at a time, read as columns, drawn over steps or epochs; needs no torch."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from pwm_torchrl.config import RENAMED_METRICS
from pwm_torchrl.files import append_text
from pwm_torchrl.terminal import warn

__all__ = ["CsvMetrics", "checked_metrics", "progress_axis", "read_metrics"]


class CsvMetrics:
    """``metrics.csv``: a row per epoch, on disk as soon as it is written.

    A column that appears late is added to the header by rewriting the file beside the old one and swapping them; rows
    that lack a column leave its cell empty. On opening, an incomplete last line, left by a killed process, is dropped,
    and, with a warning, so are damaged rows.

    Args:
        path: the file; created with its first row, continued if it exists.

    Examples:
        >>> from pwm_torchrl.run.metrics import CsvMetrics
        >>> with CsvMetrics("metrics.csv") as metrics:  # doctest: +SKIP
        ...     metrics.write({"epoch": 1, "loss/model": 0.5})
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        self._file: BinaryIO | None = None
        if self.path.exists():
            table = _read_rows(self.path)
            self.columns = table.columns
            damage = _damage(self.path.name, table)
            if damage is not None and table.columns:
                warn(f"{self.path}: {damage}")
            if table.left_out or table.torn:
                self._replace(table.rows)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Appends a row and hands it to the system at once.

        Raises:
            ValueError: if a value is no plain number, such as a tensor; :meth:`MetricRow.numbers` gives plain numbers.
            OSError: if it cannot be written; the file is as before then.
        """
        for name, value in row.items():
            if not isinstance(value, (int, float)):
                kind = type(value).__name__
                raise ValueError(f"metric {name!r} is a {kind}; write plain numbers (MetricRow.numbers)")
        new = [name for name in row if name not in self.columns]
        if new:
            rows = _read_rows(self.path).rows if self.columns else []
            self.columns += new
            self._replace(rows)
        line = io.StringIO(newline="")
        csv.writer(line).writerow([_cell(row.get(name)) for name in self.columns])
        append_text(self._open(), line.getvalue())

    def truncate(self, epoch: int) -> None:
        """Drops the rows of later epochs than ``epoch``: what a resume from that epoch will write again.

        A warning names a file whose rows end before that epoch: it was cut short.
        """
        rows = _read_rows(self.path).rows if self.columns else []
        last = int(_number(rows[-1].get("epoch"))) if rows and "epoch" in self.columns else 0
        if last < epoch:
            warn(f"{self.path} is damaged: its rows end at epoch {last}, and the run goes on after epoch {epoch}")
        if self.columns:
            self._replace([row for row in rows if _number(row.get("epoch")) <= epoch])

    def close(self) -> None:
        """Closes the file; a later :meth:`write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> CsvMetrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _replace(self, rows: Iterable[Mapping[str, str]]) -> None:
        self.close()
        partial = self.path.with_name(self.path.name + ".tmp")
        try:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(self.columns)
                writer.writerows([row.get(name, "") for name in self.columns] for row in rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads ``metrics.csv`` into columns of equal length; an empty cell becomes NaN.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return _read_rows(Path(path)).numbers()


def checked_metrics(path: str | os.PathLike[str]) -> tuple[dict[str, list[float]], str | None]:
    """The columns of :func:`read_metrics`, and what is wrong with the file.

    Returns:
        tuple: the columns, and one sentence that names the file; ``None`` for one that is whole. A last line without
        its end is no damage: a run that was killed leaves it, and one that writes it is read like that.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    file = Path(path)
    table = _read_rows(file)
    return table.numbers(), _damage(file.name, table)


def _damage(name: str, table: _Table) -> str | None:
    """What is wrong with the table of a file of this name, in one sentence."""
    rows = table.rows
    if not table.columns:
        return f"{name} is damaged: it has no header"
    cells = sum(not _is_number(cell) for row in rows for cell in row.values())
    found = []
    if table.left_out:
        found.append(f"{_count(table.left_out, 'row')} left out")
    if cells:
        found.append(f"{_count(cells, 'cell')} without a number")
    names = sum("\N{REPLACEMENT CHARACTER}" in name for name in table.columns)
    if names:
        found.append(f"{_count(names, 'column')} without a name that is text")
    if "epoch" not in table.columns:
        found.append("no column epoch")
    elif rows and not table.left_out and (missing := int(_number(rows[-1]["epoch"])) - len(rows)) > 0:
        found.append(f"no rows for {_count(missing, 'epoch')} before the last")
    return f"{name} is damaged: {', '.join(found)}" if found else None


def progress_axis(runs: Iterable[Mapping[str, Sequence[float]]]) -> tuple[str, str]:
    """Column and name of what the curves of some runs are drawn over: epochs if one of them takes no environment steps.

    Args:
        runs (iterable of mappings): columns of each run's ``metrics.csv``.
    """
    if all(any(steps > 0 for steps in metrics.get("env_steps", [])) for metrics in runs):
        return "env_steps", "environment steps"
    return "epoch", "epochs"


class _Table(NamedTuple):
    """A file's header and rows as text; rows that were left out as damaged, and whether its last line has no end."""

    columns: list[str]
    rows: list[dict[str, str]]
    left_out: int
    torn: bool

    def numbers(self) -> dict[str, list[float]]:
        """Columns of equal length; an empty cell becomes NaN."""
        return {name: [_number(row.get(name)) for row in self.rows] for name in self.columns}


def _read_rows(path: Path) -> _Table:
    """What can be relied on in a file.

    Of a damaged one, rows are left out that have not as many cells as the header, whose values may stand in other
    columns, and those whose epoch is not a whole number above that of the row before: a line that was hit, and what was
    appended a second time.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        text = file.read().replace("\0", "\N{REPLACEMENT CHARACTER}")
    complete = text[: text.rfind("\n") + 1]
    lines = [line for line in csv.reader(complete.splitlines()) if line]
    header = [RENAMED_METRICS.get(name, name) for name in lines[0]] if lines else []
    torn = len(complete) != len(text)
    rows: list[dict[str, str]] = []
    newest = -1.0
    for line in lines[1:]:
        row = dict(zip(header, line))
        if len(line) != len(header):
            continue
        if "epoch" in header:
            epoch = _number(row["epoch"])
            if not (epoch > newest and epoch.is_integer()):
                continue
            newest = epoch
        rows.append(row)
    return _Table(header, rows, len(lines) - 1 - len(rows) if lines else 0, torn)


def _is_number(text: str) -> bool:
    """Whether a cell is empty or holds a number, be it NaN or infinite."""
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _number(text: str | None) -> float:
    """The number in a cell; NaN for an empty or a damaged one."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _cell(value: float | int | None) -> str:
    return "" if value is None else repr(value)
