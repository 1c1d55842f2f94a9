"""Statistics of several runs: intervals, aggregates and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.report.collect import RunReport, natural
from pwm_torchrl.run.directory import differing_keys

__all__ = [
    "Curve",
    "Estimate",
    "Group",
    "average",
    "bootstrap_interval",
    "common_grid",
    "curve",
    "curve_interval",
    "estimate",
    "group_runs",
    "iqm",
    "mean_and_spread",
    "on_grid",
    "thin",
]

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array, int], Array]

LEVEL = 0.95
_CHUNK = 4_000_000  # numbers drawn at once, at most


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean over ``count`` values with its interval, NaN where one value has none."""

    value: float
    low: float
    high: float
    count: int


def iqm(values: npt.ArrayLike, axis: int = 0) -> Array:
    """Interquartile mean: the mean without the lowest and the highest quarter of the values.

    As many values are cut as fit into a quarter, as in rliable (https://arxiv.org/abs/2108.13264): of fewer than four
    values none, and the result is their mean.

    Args:
        values: finite numbers.
        axis: along which to average. Defaults to ``0``.

    Examples:
        >>> float(iqm([1.0, 2.0, 3.0, 100.0]))
        2.5
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=axis)
    count = ordered.shape[axis]
    cut = count // 4
    return np.take(ordered, range(cut, count - cut), axis=axis).mean(axis=axis)


def bootstrap_interval(
    strata: Sequence[npt.ArrayLike],
    statistic: Statistic = iqm,
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic of pooled values, drawn with replacement within each stratum.

    Args:
        strata: one array ``[n, ...]`` each, such as the seeds of a task.
        statistic: of pooled values along an axis. Defaults to :func:`iqm`.
        level: coverage aimed at. Defaults to ``0.95``.
        resamples: how many. Defaults to ``2000``.
        seed: of the draws; equal input gives equal intervals. Defaults to ``0``.

    Returns:
        Lower and upper end, NaN if a stratum has fewer than two values: what one value says of its spread is nothing.
    """
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    rest = arrays[0].shape[1:]
    if any(len(array) < 2 for array in arrays):
        return np.full(rest, np.nan), np.full(rest, np.nan)
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(array), size=(resamples, len(array))) for array in arrays]
    chunk = max(1, _CHUNK // sum(array.size for array in arrays))
    results = []
    for start in range(0, resamples, chunk):
        part = slice(start, start + chunk)
        results.append(statistic(np.concatenate([a[d[part]] for a, d in zip(arrays, draws)], axis=1), 1))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(results), [tail, 100 - tail], axis=0)
    return low, high


def estimate(*strata: Sequence[float], **options: Any) -> Estimate | None:
    """Interquartile mean of the pooled values and its interval; ``None`` without values.

    Args:
        strata: values, drawn from within each.
        options: of :func:`bootstrap_interval`.
    """
    filled = [stratum for stratum in strata if len(stratum)]
    if not filled:
        return None
    low, high = bootstrap_interval(filled, **options)
    pooled = np.concatenate([np.asarray(stratum, dtype=np.float64) for stratum in filled])
    return Estimate(float(iqm(pooled)), float(low), float(high), len(pooled))


def curve_interval(values: Array, *, resamples: int = 1000, seed: int = 0) -> tuple[Array, Array, Array]:
    """Interquartile mean and interval at every point of curves, over those that reach it.

    Args:
        values: ``[runs, points]``, NaN where a run has no value. Whole curves are drawn.
        resamples: how many. Defaults to ``1000``.
        seed: of the draws. Defaults to ``0``.

    Returns:
        Mean, lower and upper end, each ``[points]``; NaN where no run is, ends NaN where only one is.
    """
    there = np.isfinite(values)
    mean, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    for pattern in np.unique(there, axis=1).T:
        if not pattern.any():
            continue
        columns = (there == pattern[:, None]).all(axis=0)
        part = values[pattern][:, columns]
        mean[columns] = iqm(part)
        low[columns], high[columns] = bootstrap_interval([part], resamples=resamples, seed=seed)
    return mean, low, high


Curve = tuple[Array, Array]

POINTS = 400  # of a drawn curve, at most
_NAMED = 3  # settings named in a label, at most


@dataclass
class Group:
    """Runs of one model, size and environment, and otherwise equal settings: they differ in the seed.

    Attributes:
        settings: what tells them from runs of the same names, ``"algorithm.horizon=8"``; empty if there are none.
    """

    model: str | None
    size: str | None
    env: str | None
    settings: str
    runs: list[RunReport]

    @property
    def label(self) -> str:
        """Everything but the environment, for a legend."""
        return " ".join(filter(None, [str(self.model), str(self.size), self.settings]))


def group_runs(runs: Sequence[RunReport]) -> list[Group]:
    """Groups in reading order.

    Runs of the same names that differ in a key that matters (:func:`~pwm_torchrl.run.directory.differing_keys`) make
    groups of their own: a mean over other settings is one of nothing.
    """
    named: dict[tuple[Any, ...], list[RunReport]] = {}
    for run in runs:
        named.setdefault((run.model, run.size, run.env), []).append(run)
    groups = []
    for (model, size, env), members in named.items():
        for settings, equal in _by_settings(members):
            groups.append(Group(model, size, env, settings, sorted(equal, key=lambda run: natural(run.seed))))
    return sorted(groups, key=lambda g: [natural(text) for text in (g.env, g.size, g.model, g.settings)])


def average(values: Sequence[float | None]) -> tuple[float, float, int] | None:
    """Mean, population standard deviation and number of those that are known; ``None`` without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (float(np.mean(known)), float(np.std(known)), len(known)) if known else None


def curve(metrics: Mapping[str, Sequence[float]], y: str, x: str = "env_steps") -> Curve:
    """A column over another one, where both are finite; of rows with the same ``x`` the newest counts."""
    points = sorted(
        {a: b for a, b in zip(metrics.get(x, ()), metrics.get(y, ())) if math.isfinite(a) and math.isfinite(b)}.items()
    )
    return np.array([a for a, _ in points], dtype=np.float64), np.array([b for _, b in points], dtype=np.float64)


def thin(points: Curve, most: int = POINTS) -> Curve:
    """At most ``most`` points: means over blocks of neighbours; a shorter curve as it is."""
    x, y = points
    if len(x) <= most:
        return points
    edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def common_grid(curves: Sequence[Curve], most: int = POINTS) -> Array:
    """Every point at which one of the curves has a value; evenly picked ones where that is too many."""
    grid = np.unique(np.concatenate([x for x, _ in curves])) if curves else np.empty(0)
    return grid if len(grid) <= most else grid[np.linspace(0, len(grid) - 1, most).round().astype(int)]


def on_grid(curves: Sequence[Curve], grid: Array) -> Array:
    """Values ``[curves, points]`` by linear interpolation inside each curve's range, NaN outside of it."""
    rows = [
        np.interp(grid, x, y, left=np.nan, right=np.nan) if len(x) else np.full(len(grid), np.nan) for x, y in curves
    ]
    return np.array(rows, dtype=np.float64).reshape(len(curves), len(grid))


def mean_and_spread(values: Array) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Mean, population standard deviation and number of the curves that reach each point; NaN where none does."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    known = np.maximum(count, 1)
    mean = np.where(there, values, 0).sum(axis=0) / known
    variance = np.where(there, (values - mean) ** 2, 0).sum(axis=0) / known
    return np.where(count, mean, np.nan), np.where(count, np.sqrt(variance), np.nan), count


def _by_settings(runs: Sequence[RunReport]) -> list[tuple[str, list[RunReport]]]:
    """Runs of equal settings, with what tells them apart."""
    readable = [run for run in runs if run.config is not None]
    changed: list[dict[str, Any]] = []
    for run in readable:
        assert readable[0].config is not None
        assert run.config is not None
        differing = differing_keys(readable[0].config, run.config)
        changed.append({key: pair for key, pair in differing.items() if key != "seed"})
    keys = {key: pair[0] for pairs in changed for key, pair in pairs.items()}  # with the first run's values
    found: dict[str, list[RunReport]] = {}
    for run, pairs in zip(readable, changed):
        words = [f"{key}={pairs[key][1] if key in pairs else first}" for key, first in sorted(keys.items())]
        found.setdefault("\n".join(words), []).append(run)
    labels = [_shortened(text.splitlines()) for text in found]
    # Those that differ in what a short label leaves out are told apart by a number.
    labels = [f"{t} ({labels[: i + 1].count(t)})" if labels.count(t) > 1 else t for i, t in enumerate(labels)]
    result = list(zip(labels, found.values()))
    unreadable = [run for run in runs if run.config is None]
    return [*result, ("settings unknown", unreadable)] if unreadable else result


def _shortened(words: Sequence[str]) -> str:
    more = [f"{len(words) - _NAMED} more"] if len(words) > _NAMED else []
    return ", ".join([*words[:_NAMED], *more])
