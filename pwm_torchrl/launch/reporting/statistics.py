"""Interquartile means and their bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "bootstrap_interval", "curve_interval", "estimate", "iqm"]

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
