"""Curves on a common axis, and which runs are averaged."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("hydra")

from report_cases import report

from pwm_torchrl.report.run_tables import group_runs
from pwm_torchrl.report.statistics import aligned, curve, mean_and_spread, thin

NAN = math.nan


def series(x, y):
    return pd.Series(np.array(y, dtype=float), index=np.array(x, dtype=float))


def test_a_curve_has_finite_points_only_and_the_newest_of_each_place():
    metrics = {"env_steps": [1.0, 3.0, 2.0, 3.0, NAN, 4.0], "y": [5.0, 7.0, NAN, 8.0, 9.0, math.inf]}
    found = curve(metrics, "y")
    assert found.index.tolist() == [1.0, 3.0]
    assert found.tolist() == [5.0, 8.0]
    assert curve({}, "y").empty
    assert curve({"y": [1.0]}, "y").empty


def test_values_are_interpolated_within_a_seed_and_never_beyond():
    frame = aligned([series([0, 10], [0, 100]), series([5, 20], [1, 4])])
    assert frame.index.tolist() == [0, 5, 10, 20]
    assert np.array_equal(frame.T, [[0, 50, 100, NAN], [NAN, 1, 2, 4]], equal_nan=True)


def test_mean_and_spread_of_those_that_reach():
    found = mean_and_spread(pd.DataFrame([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]]).T)
    assert np.array_equal(found["mean"], [NAN, 2.0, 2.0], equal_nan=True)
    assert np.array_equal(found["spread"], [NAN, 1.0, 0.0], equal_nan=True)
    assert found["count"].tolist() == [0, 2, 1]


def test_long_curves_are_averaged_over_blocks():
    found = thin(series(range(10), [0, 2] * 5), most=5)
    assert found.index.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert found.tolist() == [1.0] * 5
    short = series([1, 2], [3, 4])
    assert thin(short, most=5) is short
    assert len(thin(series(range(11), range(11)), most=4)) == 4


def test_a_long_axis_keeps_its_ends():
    frame = aligned([series(range(1000), range(1000))], most=10)
    assert (len(frame), frame.index[0], frame.index[-1]) == (10, 0, 999)
    assert aligned([]).empty


def test_seeds_are_one_group_and_other_settings_another():
    runs = [report(f"seed={seed}") for seed in (2, 0, 1)]
    runs += [report("seed=0", "algorithm.horizon=8", name="short"), report("seed=0", "model=mlp")]
    groups = group_runs(runs)
    assert [(g.model, g.settings, [r.seed for r in g.runs]) for g in groups] == [
        ("mlp", "", [0]),
        ("residual", "algorithm.horizon=3", [0, 1, 2]),
        ("residual", "algorithm.horizon=8", [0]),
    ]
    assert groups[2].label == "residual tiny algorithm.horizon=8"


def test_where_a_run_logs_makes_no_group():
    runs = [report("seed=0"), report("seed=1", "logger=tensorboard", "training.progress=false", "cluster=debug")]
    assert [len(group.runs) for group in group_runs(runs)] == [2]


def test_many_settings_are_shortened_and_groups_stay_apart():
    words = ["algorithm.actor_batch", "algorithm.horizon", "algorithm.model_batch"]
    runs = [report(*(f"{word}={n}" for word in words), f"training.epochs={epochs}") for n, epochs in ((2, 3), (2, 4))]
    runs.append(report(*(f"{word}=5" for word in words), "training.epochs=3"))
    settings = [group.settings for group in group_runs(runs)]
    assert len(set(settings)) == 3
    assert all(text.startswith("algorithm.actor_batch=") and "1 more" in text for text in settings)


def test_runs_of_unknown_settings_are_not_mixed_with_others():
    unknown = report("seed=1")
    unknown.config = None
    assert [group.settings for group in group_runs([report("seed=0"), unknown])] == ["", "settings unknown"]
