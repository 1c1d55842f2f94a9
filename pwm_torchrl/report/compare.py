"""Comparison of runs by the value of a key: estimates and curves, as tables, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pwm_torchrl.report.collect import FAILED, RunReport
from pwm_torchrl.report.select import Pairs
from pwm_torchrl.report.statistics import Estimate, aligned, curve, curve_interval, estimate, thin
from pwm_torchrl.report.tables import Table
from pwm_torchrl.run.metrics import progress_axis

__all__ = [
    "ALL_TASKS",
    "AXES",
    "Comparison",
    "Row",
    "compare",
    "compare_csv",
    "compare_table",
    "compare_tex",
    "curves_csv",
]

ALL_TASKS = "all tasks"

#: X axes of the returns, with their labels.
AXES = {"env_steps": "environment steps", "epoch": "epochs", "hours": "wall-clock hours", "gpu_hours": "GPU-hours"}

_POINTS = 200  # maximum per curve
_CURVE = ("env", "arm", "axis", "x", "iqm", "low", "high", "runs")


@dataclass(frozen=True)
class Row:
    """Estimates for one value of the compared key in one environment, over the runs that finished.

    Attributes:
        finished: number of runs that trained to the end.
        failed: number of runs that failed.
        unfinished: number of runs that are still in progress or were stopped.
        difference: final return minus the baseline's, over seeds that both finished; ``None`` for the baseline.
    """

    env: str
    arm: str
    finished: int
    failed: int
    unfinished: int
    final: Estimate | None
    peak: Estimate | None
    difference: Estimate | None = None
    env_steps: Estimate | None = None
    hours: Estimate | None = None
    gpu_hours: Estimate | None = None


@dataclass
class Comparison:
    """Runs compared by the value of a key.

    Attributes:
        key: the compared key.
        arms: its values, the baseline first.
        rows: estimates, by environment and value.
        curves: interquartile mean of the return over each of :data:`AXES`, in long form: columns ``env``, ``arm``,
            ``axis``, ``x``, ``iqm``, ``low``, ``high`` and ``runs``, the number of runs that reach ``x``.
        notes: sentences about omitted runs and about how to read the results.
    """

    key: str
    arms: list[str]
    rows: list[Row]
    curves: pd.DataFrame
    notes: list[str] = field(default_factory=list)


def compare(pairs: Pairs) -> Comparison:
    """Compute estimates for every environment and value, and over all environments if there are several.

    Estimates are over finished runs; curves are over all runs, up to the point that each has reached.
    """
    result = Comparison(pairs.key, pairs.arms, [], pd.DataFrame(columns=_CURVE), list(pairs.notes))
    curves: list[pd.DataFrame] = []
    for env, arms in pairs.runs.items():
        base = next(iter(arms.values()))
        for arm, runs in arms.items():
            result.rows.append(_row(env, arm, runs, None if runs is base else base))
            curves += _curves(env, arm, list(runs.values()))
            ended = [f"seed {seed} ({run.status})" for seed, run in runs.items() if not run.finished]
            if ended:
                result.notes.append(f"{env}, {pairs.key}={arm}: not in the means: {', '.join(ended)}")
    if curves:
        result.curves = pd.concat(curves, ignore_index=True)
    if len(pairs.runs) > 1:
        _add_all_tasks(pairs, result)
    return result


def _row(env: str, arm: str, runs: Mapping[int, RunReport], base: Mapping[int, RunReport] | None) -> Row:
    done = {seed: run for seed, run in runs.items() if run.finished}
    return Row(
        env,
        arm,
        *_counts(runs.values()),
        final=_known(run.final_return for run in done.values()),
        peak=_known(run.peak_return for run in done.values()),
        difference=None if base is None else _difference(done, base),
        env_steps=_known(run.env_steps for run in done.values()),
        hours=_known(None if run.wall_clock_s is None else run.wall_clock_s / 3600 for run in done.values()),
        gpu_hours=_known(run.gpu_hours for run in done.values()),
    )


def _counts(runs: Iterable[RunReport]) -> tuple[int, int, int]:
    """Number of runs that finished, that failed, and of all others."""
    runs = list(runs)
    finished, failed = sum(run.finished for run in runs), sum(run.status in FAILED for run in runs)
    return finished, failed, len(runs) - finished - failed


def _known(values: Iterable[float | None]) -> Estimate | None:
    return estimate([value for value in values if value is not None])


def _difference(done: Mapping[int, RunReport], base: Mapping[int, RunReport]) -> Estimate | None:
    """Estimate of the difference in final return, paired by seed."""
    differences = []
    for seed, run in done.items():
        other = base[seed].final_return if base[seed].finished else None
        if run.final_return is not None and other is not None:
            differences.append(run.final_return - other)
    return estimate(differences)


def _curves(env: str, arm: str, runs: Sequence[RunReport]) -> list[pd.DataFrame]:
    over, _ = progress_axis(run.metrics for run in runs if run.metrics)
    returns = [curve(run.metrics, "eval/return_mean", over) for run in runs]
    hours = [curve(run.metrics, "eval/return_mean", "wall_clock_s") for run in runs]
    for points in hours:
        points.index = points.index / 3600
    gpu_hours = [points.set_axis(points.index * run.gpus) for run, points in zip(runs, hours) if run.gpus]
    result = []
    for axis, curves in {over: returns, "hours": hours, "gpu_hours": gpu_hours}.items():
        filled = [thin(points, _POINTS) for points in curves if len(points)]
        if filled:
            found = curve_interval(aligned(filled, _POINTS)).rename_axis("x").reset_index()
            result.append(found.assign(env=env, arm=arm, axis=axis)[list(_CURVE)])
    return result


def _add_all_tasks(pairs: Pairs, result: Comparison) -> None:
    """Add rows over all environments, with returns scaled to 0 for a random policy and 1 for the best finished run."""
    scales: dict[str, tuple[float, float]] = {}
    for env, arms in pairs.runs.items():
        runs = [run for seeds in arms.values() for run in seeds.values()]
        random = next((run.random_return for run in runs if run.random_return is not None), None)
        best = max((r.peak_return for r in runs if r.finished and r.peak_return is not None), default=None)
        complete = len(arms) == len(pairs.arms) and all(any(r.finished for r in s.values()) for s in arms.values())
        if not complete or random is None or best is None or best <= random:
            result.notes.append(f"{env} is not in '{ALL_TASKS}': not every value has a finished run above random there")
        else:
            scales[env] = (random, best - random)
    if len(scales) < 2:
        return
    result.notes.append(
        f"'{ALL_TASKS}': returns scaled to 0 for a random policy and 1 for the task's best finished run"
    )
    for arm in pairs.arms:
        done = {env: [run for run in pairs.runs[env][arm].values() if run.finished] for env in scales}
        finished, failed, unfinished = (
            sum(n) for n in zip(*(_counts(pairs.runs[env][arm].values()) for env in scales))
        )
        final = estimate(*(_scaled([r.final_return for r in runs], scales[env]) for env, runs in done.items()))
        peak = estimate(*(_scaled([r.peak_return for r in runs], scales[env]) for env, runs in done.items()))
        result.rows.append(Row(ALL_TASKS, arm, finished, failed, unfinished, final, peak))


def _scaled(values: Sequence[float | None], scale: tuple[float, float]) -> list[float]:
    return [(value - scale[0]) / scale[1] for value in values if value is not None]


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
    """CSV of the estimates at full precision, each with its interval and number of runs."""
    rows: list[dict[str, Any]] = []
    for row in comparison.rows:
        rows.append({"env": row.env, comparison.key: row.arm, **{name: getattr(row, name) for name in _COUNTS}})
        for name in _ESTIMATES:
            found: Estimate | None = getattr(row, name)
            value, low, high, count = (None, None, None, 0) if found is None else dataclasses.astuple(found)
            rows[-1] |= {f"{name}_iqm": value, f"{name}_low": low, f"{name}_high": high, f"{name}_runs": count}
    return pd.DataFrame(rows).to_csv(index=False)


def curves_csv(comparison: Comparison) -> str:
    """CSV of the curves at full precision."""
    return comparison.curves.rename(columns={"arm": comparison.key}).to_csv(index=False)


def compare_tex(comparison: Comparison) -> str:
    """A LaTeX ``tabular`` with booktabs rules."""
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
