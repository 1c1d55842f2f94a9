"""``metrics.csv``: writing it row by row, reading it as columns, and its x axis for curves; does not import torch."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from pwm_torchrl.files import append_text, replacing
from pwm_torchrl.terminal import warn

__all__ = ["CsvMetrics", "checked_metrics", "progress_axis", "read_metrics"]

#: Metrics of earlier versions and their current names.
RENAMED_METRICS = {
    "loss/value": "loss/critic",
    "grad_norm/value": "grad_norm/critic",
    "lr/world_model": "lr/model",
    "lr/critics": "lr/critic",
    "memory/imagination_micro_batch": "memory/actor_micro_batch",
}


class CsvMetrics:
    """``metrics.csv``: one row per epoch, written without buffering.

    A new column is added by writing a new file that replaces the old one; a row without a value for a column has an
    empty cell. On opening, an incomplete last line, left by a killed process, is dropped. Damaged rows are dropped with
    a warning.

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
        """Appends a row, without buffering.

        Raises:
            ValueError: if a value is not a plain number but, for example, a tensor; see :meth:`MetricRow.numbers`.
            OSError: if it cannot be written; the file is unchanged then.
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
        """Drops the rows after ``epoch``, because a run that resumes from that epoch writes them again.

        Warns if the rows end before that epoch, which means that some were lost.
        """
        rows = _read_rows(self.path).rows if self.columns else []
        last = int(_number(rows[-1].get("epoch"))) if rows and "epoch" in self.columns else 0
        if last < epoch:
            warn(f"{self.path} is damaged: its rows end at epoch {last}, but the run continues after epoch {epoch}")
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
        with replacing(self.path, durable=True) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([row.get(name, "") for name in self.columns] for row in rows)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads ``metrics.csv`` into columns of equal length; an empty cell becomes NaN.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return _read_rows(Path(path)).numbers()


def checked_metrics(path: str | os.PathLike[str]) -> tuple[dict[str, list[float]], str | None]:
    """The columns of :func:`read_metrics`, and a description of damage to the file.

    Returns:
        tuple: the columns, and one sentence that names the file and its damage; ``None`` if it is intact. An incomplete
        last line is not damage: a killed run leaves one, and a run that is writing may have one for a moment.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    file = Path(path)
    table = _read_rows(file)
    return table.numbers(), _damage(file.name, table)


def _damage(name: str, table: _Table) -> str | None:
    """The damage of a file's table in one sentence; ``None`` if it is intact."""
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
    """Column and label of the x axis for the curves of some runs: environment steps, or epochs if one run has none.

    Args:
        runs (iterable of mappings): columns of each run's ``metrics.csv``.
    """
    if all(any(steps > 0 for steps in metrics.get("env_steps", [])) for metrics in runs):
        return "env_steps", "environment steps"
    return "epoch", "epochs"


class _Table(NamedTuple):
    """A file's header and rows as text, the number of damaged rows left out, and whether the file ends in mid-line."""

    columns: list[str]
    rows: list[dict[str, str]]
    left_out: int
    torn: bool

    def numbers(self) -> dict[str, list[float]]:
        """Columns of equal length; an empty cell becomes NaN."""
        return {name: [_number(row.get(name)) for row in self.rows] for name in self.columns}


def _read_rows(path: Path) -> _Table:
    """The intact rows of a file.

    Rows with another number of cells than the header are left out, because their values may be in the wrong columns. So
    are rows whose epoch is not an integer greater than that of the previous row, because they are damaged or repeated.
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
    """Whether a cell is empty or contains a number, including NaN and infinities."""
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
