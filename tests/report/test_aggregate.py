"""Curves on a common grid, and which runs are averaged."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("hydra")

from report_cases import report

from pwm_torchrl.report.statistics import average, common_grid, curve, group_runs, mean_and_spread, on_grid, thin

NAN = math.nan


def pair(x, y):
    return np.array(x, dtype=float), np.array(y, dtype=float)


def test_a_curve_has_finite_points_only_and_the_newest_of_each_place():
    metrics = {"env_steps": [1.0, 2.0, 3.0, 3.0, NAN, 4.0], "y": [5.0, NAN, 7.0, 8.0, 9.0, math.inf]}
    x, y = curve(metrics, "y")
    assert x.tolist() == [1.0, 3.0]
    assert y.tolist() == [5.0, 8.0]
    assert curve({}, "y")[0].size == 0


def test_values_are_interpolated_within_a_seed_and_never_beyond():
    curves = [pair([0, 10], [0, 100]), pair([5, 20], [1, 4])]
    grid = common_grid(curves)
    assert grid.tolist() == [0, 5, 10, 20]
    assert np.array_equal(on_grid(curves, grid), [[0, 50, 100, NAN], [NAN, 1, 2, 4]], equal_nan=True)


def test_mean_and_spread_of_those_that_reach():
    mean, spread, count = mean_and_spread(np.array([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]]))
    assert np.array_equal(mean, [NAN, 2.0, 2.0], equal_nan=True)
    assert np.array_equal(spread, [NAN, 1.0, 0.0], equal_nan=True)
    assert count.tolist() == [0, 2, 1]


def test_long_curves_are_averaged_over_blocks():
    x, y = thin(pair(range(10), [0, 2] * 5), most=5)
    assert x.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert y.tolist() == [1.0] * 5
    short = pair([1, 2], [3, 4])
    assert thin(short, most=5) is short
    assert thin(pair(range(11), range(11)), most=4)[0].size == 4


def test_a_long_grid_keeps_its_ends():
    grid = common_grid([pair(range(1000), range(1000))], most=10)
    assert (len(grid), grid[0], grid[-1]) == (10, 0, 999)
    assert common_grid([]).size == 0


def test_average_of_what_is_known():
    assert average([1.0, None, 3.0, NAN]) == (2.0, 1.0, 2)
    assert average([None]) is None


def test_seeds_are_one_group_and_other_settings_another():
    runs = [report(f"seed={seed}") for seed in (2, 0, 1)]
    runs += [report("seed=0", "algorithm.horizon=8", name="short"), report("seed=0", "model=mlp")]
    groups = group_runs(runs)
    assert [(g.model, g.settings, [r.seed for r in g.runs]) for g in groups] == [
        ("flow_v2", "algorithm.horizon=8", [0]),
        ("flow_v2", "algorithm.horizon=16", [0, 1, 2]),
        ("mlp", "", [0]),
    ]
    assert groups[0].label == "flow_v2 tiny algorithm.horizon=8"


def test_where_a_run_logs_makes_no_group():
    runs = [report("seed=0"), report("seed=1", "logger=tensorboard", "training.progress=false", "cluster=debug")]
    assert [len(group.runs) for group in group_runs(runs)] == [2]


def test_many_settings_are_shortened_and_groups_stay_apart():
    words = ["algorithm.actor_updates", "algorithm.horizon", "algorithm.model_updates"]
    runs = [report(*(f"{word}={n}" for word in words), f"training.epochs={epochs}") for n, epochs in ((2, 3), (2, 4))]
    runs.append(report(*(f"{word}=5" for word in words), "training.epochs=3"))
    settings = [group.settings for group in group_runs(runs)]
    assert len(set(settings)) == 3
    assert all(text.startswith("algorithm.actor_updates=") and "1 more" in text for text in settings)


def test_runs_of_unknown_settings_are_not_mixed_with_others():
    unknown = report("seed=1")
    unknown.config = None
    assert [group.settings for group in group_runs([report("seed=0"), unknown])] == ["", "settings unknown"]
