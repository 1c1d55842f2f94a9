"""Metrics of a run: collected as detached numbers, written to ``metrics.csv`` one row at a time.

Nothing that outlives a step may own an autograd graph: a logged loss that kept its graph once cost a run 128 GB of host
memory. A tensor that requires grad is therefore refused here instead of being detached in silence.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from pwm_torchrl.training.append import append_text

__all__ = ["CsvMetrics", "MetricRow", "read_metrics"]

Number = int | float


class MetricRow:
    """One row of metrics while an epoch fills it.

    :meth:`set` keeps the last value, :meth:`mean` averages over the calls. Tensors stay on their device until
    :meth:`numbers`, so that collecting does not wait for the accelerator at every update.

    Examples:
        >>> row = MetricRow()
        >>> row.set({"epoch": 3})
        >>> for loss in (1.0, 3.0):
        ...     row.mean({"model": loss}, prefix="loss/")
        >>> row.numbers()
        {'epoch': 3, 'loss/model': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def set(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Stores values, replacing earlier ones of the same name.

        Args:
            values: numbers or tensors with one element and no gradient; a TensorDict of such works too.
            prefix: put in front of each name. Defaults to ``""``.

        Raises:
            ValueError: if a tensor requires grad or has more than one element.
            TypeError: if a value is not a number.
        """
        for name, value in values.items():
            key = prefix + name
            self._sums[key] = _check(key, value)
            self._counts[key] = 1

    def mean(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds values to the running mean of their names; takes and raises what :meth:`set` does."""
        for name, value in values.items():
            key = prefix + name
            checked = _check(key, value)
            self._sums[key] = self._sums[key] + checked if key in self._sums else checked
            self._counts[key] = self._counts.get(key, 0) + 1

    def numbers(self) -> dict[str, Number]:
        """The row as plain Python numbers, in the order in which the names appeared."""
        return {key: _number(total, self._counts[key]) for key, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The row as far as it is filled, to the bit."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], device: Any = None) -> MetricRow:
        """A row as :meth:`state_dict` gave it, its tensors on ``device``."""
        row = cls()
        row._sums = {
            k: v.to(device) if isinstance(v, Tensor) and device is not None else v
            for k, v in state_dict["sums"].items()
        }
        row._counts = dict(state_dict["counts"])
        return row


class CsvMetrics:
    """``metrics.csv``: a row per epoch, on disk as soon as it is written.

    A column that appears late is added to the header by rewriting the file beside the old one and swapping them; rows
    that lack a column leave its cell empty. An incomplete last line, left by a killed process, is dropped on opening.

    Args:
        path: the file; created with its first row, continued if it exists.

    Examples:
        >>> with CsvMetrics(tmp_path / "metrics.csv") as metrics:  # doctest: +SKIP
        ...     metrics.write({"epoch": 1, "loss/model": 0.5})
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        self._file: BinaryIO | None = None
        if self.path.exists():
            self.columns, rows, intact = _read_rows(self.path)
            if not intact:
                self._replace(rows)

    def write(self, row: Mapping[str, Number]) -> None:
        """Appends a row and hands it to the system at once.

        Raises:
            ValueError: if a value is a tensor; :meth:`MetricRow.numbers` gives plain numbers.
            OSError: if it cannot be written; the file is as before then.
        """
        for name, value in row.items():
            if isinstance(value, Tensor):
                raise ValueError(f"metric {name!r} is a tensor; write plain numbers (MetricRow.numbers)")
        new = [name for name in row if name not in self.columns]
        if new:
            rows = _read_rows(self.path)[1] if self.columns else []
            self.columns += new
            self._replace(rows)
        line = io.StringIO(newline="")
        csv.writer(line).writerow([_cell(row.get(name)) for name in self.columns])
        append_text(self._open(), line.getvalue())

    def truncate(self, epoch: int) -> None:
        """Drops the rows of later epochs than ``epoch``: what a resume from that epoch will write again."""
        if self.columns:
            rows = _read_rows(self.path)[1]
            self._replace([row for row in rows if float(row.get("epoch") or "-inf") <= epoch])

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
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads ``metrics.csv`` into columns of equal length; an empty cell becomes NaN.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    columns, rows, _ = _read_rows(Path(path))
    return {name: [float(row.get(name) or "nan") for row in rows] for name in columns}


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]], bool]:
    """Header, complete rows as text, and whether the file ended with a complete line."""
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(complete.splitlines()))
    if not lines:
        return [], [], not text
    header = lines[0]
    return header, [dict(zip(header, line)) for line in lines[1:] if line], len(complete) == len(text)


def _check(name: str, value: Any) -> Any:
    """The value itself, or its detached tensor, after refusing what must not be kept."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"metric {name!r} requires grad and would keep its autograd graph alive; detach it where it is made"
            )
        if value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a metric is one number")
        # A copy: the caller may overwrite its tensor in place before the row is read.
        return value.reshape(()).clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}; a metric is one number")
    return int(value) if isinstance(value, Integral) else float(value)


def _number(total: Any, count: int) -> Number:
    value = total.item() if isinstance(total, Tensor) else total
    return value if count == 1 else value / count


def _cell(value: Number | None) -> str:
    return "" if value is None else repr(value)
