"""Values of one key against each other: interquartile means over paired seeds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pwm_torchrl.launch.reporting.aggregate import (
    Array,
    Curve,
    common_grid,
    curve,
    on_grid,
    thin,
)
from pwm_torchrl.launch.reporting.collect import FAILED, RunReport
from pwm_torchrl.launch.reporting.pairing import Pairs
from pwm_torchrl.launch.reporting.statistics import Estimate, curve_interval, estimate
from pwm_torchrl.training.axis import progress_axis

__all__ = ["ALL_TASKS", "AXES", "CompareCurve", "Comparison", "Row", "compare"]

ALL_TASKS = "all tasks"

#: What a return is drawn over: its name and the column's unit.
AXES = {"env_steps": "environment steps", "epoch": "epochs", "hours": "wall-clock hours", "gpu_hours": "GPU-hours"}

_POINTS = 200


@dataclass(frozen=True)
class Row:
    """One value of the compared key in one environment.

    Attributes:
        finished: runs that trained to their end; the estimates are over those.
        failed: runs that ended before.
        unfinished: runs that have not ended, or were stopped.
        difference: of the final return from the baseline's, over seeds that both finished; ``None`` for the baseline.
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


@dataclass(frozen=True)
class CompareCurve:
    """Interquartile mean of the return over an axis, with its interval and the number of runs that reach each point."""

    env: str
    arm: str
    axis: str
    x: Array
    mean: Array
    low: Array
    high: Array
    count: Array


@dataclass
class Comparison:
    """What ``--compare`` found; ``notes`` says what was left out and how to read it."""

    key: str
    arms: list[str]
    rows: list[Row]
    curves: list[CompareCurve]
    notes: list[str] = field(default_factory=list)


def compare(pairs: Pairs) -> Comparison:
    """Estimates for every environment and value, and over all environments where there are several.

    Final and peak returns are of runs that finished, whose number stands beside them; curves are of all runs, as far as
    each has come.
    """
    result = Comparison(pairs.key, pairs.arms, [], [], list(pairs.notes))
    for env, arms in pairs.runs.items():
        base = next(iter(arms.values()))
        for arm, runs in arms.items():
            result.rows.append(_row(env, arm, runs, None if runs is base else base))
            result.curves += _curves(env, arm, list(runs.values()))
            ended = [f"seed {seed} ({run.status})" for seed, run in runs.items() if not run.finished]
            if ended:
                result.notes.append(f"{env}, {pairs.key}={arm}: not in the means: {', '.join(ended)}")
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
    """How many finished, failed and neither."""
    runs = list(runs)
    finished, failed = sum(run.finished for run in runs), sum(run.status in FAILED for run in runs)
    return finished, failed, len(runs) - finished - failed


def _known(values: Iterable[float | None]) -> Estimate | None:
    return estimate([value for value in values if value is not None])


def _difference(done: Mapping[int, RunReport], base: Mapping[int, RunReport]) -> Estimate | None:
    """Of final returns, seed by seed."""
    differences = []
    for seed, run in done.items():
        other = base[seed].final_return if base[seed].finished else None
        if run.final_return is not None and other is not None:
            differences.append(run.final_return - other)
    return estimate(differences)


def _curves(env: str, arm: str, runs: Sequence[RunReport]) -> list[CompareCurve]:
    over, _ = progress_axis(run.metrics for run in runs if run.metrics)
    returns = [curve(run.metrics, "eval/return_mean", over) for run in runs]
    clocks = [curve(run.metrics, "eval/return_mean", "wall_clock_s") for run in runs]
    found: dict[str, list[Curve]] = {
        over: returns,
        "hours": [(x / 3600, y) for x, y in clocks],
        "gpu_hours": [(x / 3600 * run.gpus, y) for run, (x, y) in zip(runs, clocks) if run.gpus],
    }
    result = []
    for axis, curves in found.items():
        thinned = [thin(points, _POINTS) for points in curves if len(points[0])]
        if thinned:
            grid = common_grid(thinned, _POINTS)
            values = on_grid(thinned, grid)
            count = np.isfinite(values).sum(axis=0).astype(np.float64)
            result.append(CompareCurve(env, arm, axis, grid, *curve_interval(values), count))
    return result


def _add_all_tasks(pairs: Pairs, result: Comparison) -> None:
    """Rows over environments: returns on a scale on which a random policy has 0 and the best finished run 1."""
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
