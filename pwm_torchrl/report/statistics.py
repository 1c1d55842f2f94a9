"""Statistics over runs: interquartile means, bootstrap intervals, and curves on a common axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

__all__ = [
    "Estimate",
    "aligned",
    "bootstrap_interval",
    "curve",
    "curve_interval",
    "estimate",
    "iqm",
    "mean_and_spread",
    "mean_of_means",
    "pooled_iqm",
    "thin",
]

Array = npt.NDArray[np.float64]
#: A statistic of several arrays, one per stratum, along an axis.
Statistic = Callable[..., Array]

LEVEL = 0.95
POINTS = 400  # maximum per drawn curve
_TRIM = 0.25  # fraction that an interquartile mean cuts from each end
_NUMBERS_AT_ONCE = 4_000_000  # maximum number of resampled values in memory


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean of ``count`` values with its interval, which is NaN for a single value."""

    value: float
    low: float
    high: float
    count: int


def iqm(values: npt.ArrayLike, axis: int = 0) -> Array:
    """Interquartile mean: the mean without the lowest and the highest quarter of the values.

    The number of values cut from each end is a quarter of the count, rounded down, as in rliable
    (https://arxiv.org/abs/2108.13264). With fewer than four values none is cut, and the result is their mean.

    Args:
        values: finite numbers.
        axis: axis to average over. Defaults to ``0``.

    Examples:
        >>> from pwm_torchrl.report.statistics import iqm
        >>> float(iqm([1.0, 2.0, 3.0, 100.0]))
        2.5
    """
    return np.asarray(stats.trim_mean(np.asarray(values, dtype=np.float64), _TRIM, axis=axis))


def pooled_iqm(*strata: Array, axis: int = 0) -> Array:
    """Interquartile mean of the values of all strata together."""
    return iqm(np.concatenate(strata, axis=axis), axis)


def mean_of_means(*strata: Array, axis: int = 0) -> Array:
    """Mean over strata of the mean within each, so that every stratum has the same weight."""
    return np.mean([np.mean(stratum, axis=axis) for stratum in strata], axis=0)


def bootstrap_interval(
    strata: Sequence[npt.ArrayLike],
    statistic: Statistic = pooled_iqm,
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic; values are resampled within each stratum.

    Args:
        strata: one array ``[n, ...]`` per stratum, such as the seeds of a task.
        statistic: function of the strata and ``axis``. Defaults to :func:`pooled_iqm`.
        level: nominal coverage. Defaults to ``0.95``.
        resamples: number of resamples. Defaults to ``2000``.
        seed: seed of the resampling; equal input gives equal intervals. Defaults to ``0``.

    Returns:
        Lower and upper bound, each ``[...]``; NaN if a stratum has fewer than two values.
    """
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if any(len(array) < 2 for array in arrays):
        nothing = np.full(arrays[0].shape[1:], np.nan)
        return nothing, nothing.copy()
    interval = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        batch=max(1, min(resamples, _NUMBERS_AT_ONCE // sum(array.size for array in arrays))),
        vectorized=True,
        axis=0,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return np.asarray(interval.low), np.asarray(interval.high)


def estimate(*strata: Sequence[float], **options: Any) -> Estimate | None:
    """Interquartile mean of all values with its interval; ``None`` without values.

    Args:
        strata: values, resampled within each stratum.
        options: arguments of :func:`bootstrap_interval`.
    """
    filled = [np.asarray(stratum, dtype=np.float64) for stratum in strata if len(stratum)]
    if not filled:
        return None
    low, high = bootstrap_interval(filled, **options)
    return Estimate(float(pooled_iqm(*filled)), float(low), float(high), sum(map(len, filled)))


# Curves ---------------------------------------------------------------------------------------------------------------


def curve(metrics: Mapping[str, Sequence[float]], y: str, x: str = "env_steps") -> pd.Series:
    """One column as a function of another, where both are finite; the newest of several rows with the same ``x``.

    Args:
        metrics: columns of a run's ``metrics.csv``.
        y: name of the value column.
        x: name of the index column. Defaults to ``"env_steps"``.

    Returns:
        A float series with an increasing float index; empty if a column is missing.
    """
    if x not in metrics or y not in metrics:
        return pd.Series(dtype=np.float64, index=pd.Index([], dtype=np.float64))
    points = pd.Series(np.asarray(metrics[y], dtype=np.float64), index=np.asarray(metrics[x], dtype=np.float64))
    points = points[np.isfinite(points.to_numpy()) & np.isfinite(points.index.to_numpy())]
    return points[~points.index.duplicated(keep="last")].sort_index()


def thin(points: pd.Series, most: int = POINTS) -> pd.Series:
    """Reduce a curve to at most ``most`` points by averaging index and values over consecutive blocks."""
    if len(points) <= most:
        return points
    block = np.arange(len(points)) * most // len(points)
    index = points.index.to_series().groupby(block).mean()
    return pd.Series(points.groupby(block).mean().to_numpy(), index=index.to_numpy())


def aligned(curves: Sequence[pd.Series], most: int = POINTS) -> pd.DataFrame:
    """Curves on one axis, interpolated linearly within each curve's range.

    Args:
        curves: from :func:`curve`.
        most: maximum number of rows; of more points, evenly spaced ones are kept, including the first and the last.
            Defaults to ``400``.

    Returns:
        A data frame with one row per point of any curve and one column per curve; NaN outside the curve's range.
    """
    if not curves:
        return pd.DataFrame()
    frame = pd.concat(list(curves), axis=1, keys=range(len(curves)), sort=True)
    frame = frame.interpolate(method="index", limit_area="inside")
    if len(frame) <= most:
        return frame
    return frame.iloc[np.linspace(0, len(frame) - 1, most).round().astype(int)]


def mean_and_spread(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean, population standard deviation (``spread``) and ``count`` of the curves that reach each point."""
    spread = curves.std(axis=1, ddof=0)
    return pd.DataFrame({"mean": curves.mean(axis=1), "spread": spread, "count": curves.count(axis=1)})


def curve_interval(curves: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Interquartile mean and interval at every point, over the curves that reach it.

    Whole curves are resampled.

    Args:
        curves: from :func:`aligned`.
        resamples: number of resamples. Defaults to ``1000``.
        seed: seed of the resampling. Defaults to ``0``.

    Returns:
        Columns ``iqm``, ``low``, ``high`` and ``runs``, with the index of ``curves``. All are NaN where there is no
        curve, and the interval is NaN where there is only one.
    """
    values = curves.to_numpy(dtype=np.float64).T
    there = np.isfinite(values)
    mean, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    # Points reached by the same curves are resampled together.
    for reached in np.unique(there, axis=1).T:
        if reached.any():
            points = (there == reached[:, None]).all(axis=0)
            part = values[reached][:, points]
            mean[points] = iqm(part)
            low[points], high[points] = bootstrap_interval([part], resamples=resamples, seed=seed)
    return pd.DataFrame({"iqm": mean, "low": low, "high": high, "runs": there.sum(axis=0)}, index=curves.index)
