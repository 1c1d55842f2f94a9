"""A comparison as a table, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from pwm_torchrl.launch.reporting.compare import ALL_TASKS, Comparison
from pwm_torchrl.launch.reporting.statistics import Estimate
from pwm_torchrl.launch.reporting.tables import Table

__all__ = ["compare_csv", "compare_table", "compare_tex", "curves_csv"]

_COUNTS = ("finished", "failed", "unfinished")
_ESTIMATES = ("final", "peak", "difference", "env_steps", "hours", "gpu_hours")


def compare_table(comparison: Comparison) -> Table:
    """One row per environment and value."""
    head = ["env", comparison.key, "finished", "failed", "open", "final IQM", "peak IQM"]
    head += [f"final IQM - {comparison.arms[0]}", "steps", "hours", "GPU-hours"]
    rows = []
    for row in comparison.rows:
        digits = 3 if row.env == ALL_TASKS else 1
        rows.append([row.env, row.arm, *(str(getattr(row, name)) for name in _COUNTS)])
        rows[-1] += [_interval(estimate, digits) for estimate in (row.final, row.peak, row.difference)]
        rows[-1] += [_value(row.env_steps, 0), _value(row.hours, 2), _value(row.gpu_hours, 2)]
    difference = head[7]
    narrow = (difference, "GPU-hours", "hours", "steps", "peak IQM")
    return Table(head, rows, narrow=narrow, below={difference: f"{difference}: "})


def compare_csv(comparison: Comparison) -> str:
    """Full precision; every estimate with the ends of its interval and the number of runs it is over."""
    head = ["env", comparison.key, *_COUNTS]
    head += [f"{name}_{part}" for name in _ESTIMATES for part in ("iqm", "low", "high", "runs")]
    rows: list[list[Any]] = []
    for row in comparison.rows:
        rows.append([row.env, row.arm, *(getattr(row, name) for name in _COUNTS)])
        for name in _ESTIMATES:
            estimate: Estimate | None = getattr(row, name)
            parts = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
            rows[-1] += [*(_cell(part) for part in parts), 0 if estimate is None else estimate.count]
    return _csv([head, *rows])


def curves_csv(comparison: Comparison) -> str:
    """Every point of every curve."""
    rows: list[list[Any]] = [["env", comparison.key, "axis", "x", "iqm", "low", "high", "runs"]]
    for c in comparison.curves:
        for x, mean, low, high, count in zip(c.x, c.mean, c.low, c.high, c.count):
            rows.append([c.env, c.arm, c.axis, *(_cell(float(v)) for v in (x, mean, low, high)), int(count)])
    return _csv(rows)


def compare_tex(comparison: Comparison) -> str:
    """A ``tabular`` in the style of booktabs, for a paper to input."""
    lines = [
        "% Interquartile means with 95 % bootstrap intervals over seeds that finished; needs \\usepackage{booktabs}.",
        *(f"% {note}" for note in comparison.notes),
        "\\begin{tabular}{llrrrr}",
        "\\toprule",
        f"Task & {_escaped(comparison.key)} & seeds & final return & peak return & "
        f"final return $-$ {_escaped(comparison.arms[0])} \\\\",
    ]
    before = None
    for row in comparison.rows:
        lines += ["\\midrule"] if row.env != before else []
        seeds = f"{row.finished} of {row.finished + row.failed + row.unfinished}"
        digits = 3 if row.env == ALL_TASKS else 1
        estimates = [_tex(estimate, digits) for estimate in (row.final, row.peak, row.difference)]
        env = "" if row.env == before else _escaped(row.env)
        lines.append(" & ".join([env, _escaped(row.arm), seeds, *estimates]) + " \\\\")
        before = row.env
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _interval(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    text = _value(estimate, digits)
    return text if math.isnan(estimate.low) else f"{text} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _value(estimate: Estimate | None, digits: int) -> str:
    return (
        "-" if estimate is None else f"{estimate.value:,.{digits}f}" if not digits else f"{estimate.value:.{digits}f}"
    )


def _tex(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "--"
    text = f"${estimate.value:.{digits}f}$"
    if math.isnan(estimate.low):
        return text
    return f"{text} [${estimate.low:.{digits}f}$, ${estimate.high:.{digits}f}$]"


def _escaped(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)


def _csv(rows: list[list[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
