"""Interquartile means and bootstrap intervals, against numbers written out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pwm_torchrl.report.statistics import bootstrap_interval, curve_interval, estimate, iqm, mean_of_means


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 6.0], 3.0),  # too few to cut
        ([100.0, 1.0, 3.0, 2.0], 2.5),
        ([9.0, 1.0, 2.0, 3.0, 100.0], 14 / 3),  # 2, 3, 9
        ([0.0, -50.0, 1.0, 2.0, 3.0, 4.0, 5.0, 1000.0], 2.5),  # 1, 2, 3, 4
    ],
)
def test_iqm_of_known_numbers(values, expected):
    assert iqm(values) == pytest.approx(expected)


def test_iqm_along_an_axis():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [99.0, -99.0]])
    assert iqm(values).tolist() == [2.5, 15.0]
    assert iqm(values.T, axis=1).tolist() == [2.5, 15.0]


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6)))
def test_iqm_lies_between_the_quartiles_it_keeps(values):
    ordered = np.sort(values)
    cut = len(values) // 4
    assert ordered[cut] - 1e-6 <= iqm(values) <= ordered[len(values) - cut - 1] + 1e-6
    assert iqm(values + 3) == pytest.approx(iqm(values) + 3, abs=1e-6)


def test_interval_covers_as_often_as_it_says():
    """A 90 % interval of the mean of 20 normal values: the percentile bootstrap's is known to cover a little less."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval([generator.normal(2.0, 1.0, 20)], level=0.9, resamples=400, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.83 <= covered / 300 <= 0.94


def test_interval_is_that_of_all_resamples():
    """Of two values the mean of a resample is one of three numbers, with probability 1/4, 1/2 and 1/4."""
    low, high = bootstrap_interval([[0.0, 1.0]], level=0.6)
    assert (low, high) == (0.0, 1.0)
    low, high = bootstrap_interval([[0.0, 1.0]], level=0.4)
    assert (low, high) == (0.5, 0.5)


def test_equal_input_gives_equal_intervals():
    values = np.random.default_rng(0).normal(size=10)
    assert bootstrap_interval([values]) == bootstrap_interval([values])
    assert bootstrap_interval([values], seed=1, resamples=50) != bootstrap_interval([values], seed=2, resamples=50)


def test_resampling_stays_within_a_stratum():
    """Tasks of different scale: each keeps its number of runs, so that the spread is that within the tasks."""
    low, high = bootstrap_interval([[0.0, 0.0, 0.0], [100.0, 100.0, 100.0]])
    assert (low, high) == (50.0, 50.0)
    low, high = bootstrap_interval([[0.0, 0.0, 0.0, 100.0, 100.0, 100.0]])
    assert low < 40
    assert high > 60


def test_a_task_counts_once_however_many_seeds_it_has():
    strata = [np.zeros(100), np.full(2, 10.0)]
    assert mean_of_means(*strata) == 5.0
    assert bootstrap_interval(strata, mean_of_means) == (5.0, 5.0)


def test_an_interval_at_every_place():
    values = np.random.default_rng(0).normal([0.0, 10.0, 20.0], size=(6, 3))
    low, high = bootstrap_interval([values[:4], values[4:]])
    assert low.shape == high.shape == (3,)
    assert ((low < iqm(values)) & (iqm(values) < high)).all()
    alone = bootstrap_interval([values[:4, 1], values[4:, 1]])
    assert [low[1], high[1]] == pytest.approx([float(end) for end in alone], abs=0.2)


def test_one_value_has_no_interval():
    one = estimate([4.0])
    assert one is not None
    assert (one.value, one.count) == (4.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert estimate([]) is None
    assert estimate([], []) is None


def test_estimate_pools_the_strata():
    pooled = estimate([0.0, 1.0], [], [2.0, 3.0])
    assert pooled is not None
    assert (pooled.value, pooled.count) == (1.5, 4)
    assert pooled.low <= 1.5 <= pooled.high


def test_curves_are_averaged_where_they_are():
    nan = math.nan
    found = curve_interval(pd.DataFrame([[nan, 1.0, 2.0, nan], [nan, 3.0, 4.0, 5.0]]).T)
    assert np.array_equal(found["iqm"], [nan, 2.0, 3.0, 5.0], equal_nan=True)
    assert np.array_equal(found["low"], [nan, 1.0, 2.0, nan], equal_nan=True)
    assert np.array_equal(found["high"], [nan, 3.0, 4.0, nan], equal_nan=True)
    assert found["runs"].tolist() == [0, 2, 2, 1]
