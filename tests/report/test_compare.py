"""Estimates over paired seeds, and what is counted instead of averaged."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

pytest.importorskip("hydra")

import pandas as pd
from report_cases import report

from pwm_torchrl.report.compare import (
    ALL_TASKS,
    Comparison,
    Row,
    compare,
    compare_csv,
    compare_table,
    compare_tex,
    curves_csv,
)
from pwm_torchrl.report.select import pair_runs
from pwm_torchrl.report.statistics import Estimate


def runs_of(model, finals, env="pendulum", **known):
    return [
        report(
            f"model={model}", f"seed={seed}", f"env={env}", final_return=final, peak_return=final + 1,
            random_return=0.0, wall_clock_s=3600.0, env_steps=1000.0, **known,
        )
        for seed, final in enumerate(finals)
    ]  # fmt: skip


def test_means_and_differences_over_seeds():
    runs = [*runs_of("mlp", [1.0, 2.0, 3.0, 50.0]), *runs_of("residual", [11.0, 13.0, 15.0, 50.0])]
    base, other = compare(pair_runs(runs, "model")).rows
    assert (base.arm, base.finished, base.failed, base.unfinished) == ("mlp", 4, 0, 0)
    assert base.final is not None
    assert base.final.value == 2.5
    assert base.final.low <= 2.5 <= base.final.high
    assert base.peak is not None
    assert base.peak.value == 3.5
    assert base.difference is None
    assert other.final is not None
    assert other.final.value == 14.0
    # Seed by seed 10, 11, 12, 0: their mean is not the difference of the means.
    assert other.difference is not None
    assert other.difference.value == 10.5
    assert other.hours is not None
    assert other.hours.value == 1.0
    assert other.gpu_hours is None


def test_runs_that_did_not_finish_are_counted_and_said():
    runs = [*runs_of("mlp", [1.0, 2.0, 3.0, 4.0, 5.0]), *runs_of("residual", [5.0, 6.0, 7.0, 8.0, 9.0])]
    for run, status in zip(runs[1:], ("failed", "memory", "running", "stopped")):
        run.status = status
    base, other = compare(pair_runs(runs, "model")).rows
    assert (base.finished, base.failed, base.unfinished) == (1, 2, 2)
    assert base.final is not None
    assert (base.final.value, base.final.count) == (1.0, 1)
    assert math.isnan(base.final.low)
    assert other.finished == 5
    assert other.difference is not None
    assert (other.difference.value, other.difference.count) == (4.0, 1)
    notes = compare(pair_runs(runs, "model")).notes
    assert notes == [
        "pendulum, model=mlp: not in the means: seed 1 (failed), seed 2 (memory), seed 3 (running), seed 4 (stopped)"
    ]


def test_nothing_finished():
    rows = compare(pair_runs([*runs_of("mlp", [1.0], status="failed"), *runs_of("residual", [2.0])], "model")).rows
    assert rows[0].final is None
    assert rows[1].difference is None


def test_curves_over_three_axes():
    runs = [*runs_of("mlp", [0.0, 0.0], gpus=2), *runs_of("residual", [0.0, 0.0])]
    for run in runs:
        late = run.seed * 10.0
        run.metrics = {
            "env_steps": [1.0, 100.0, 200.0],
            "wall_clock_s": [1.0, 3600.0, 7200.0],
            "eval/return_mean": [math.nan, 10.0 + late, 20.0 + late],
        }
    runs[1].metrics = {key: values[:2] for key, values in runs[1].metrics.items()}
    curves = compare(pair_runs(runs, "model")).curves
    found = dict(list(curves.groupby(["arm", "axis"], sort=False)))
    assert list(found) == [
        ("mlp", "env_steps"), ("mlp", "hours"), ("mlp", "gpu_hours"), ("residual", "env_steps"), ("residual", "hours"),
    ]  # fmt: skip
    steps, hours, gpu_hours, complete, _ = found.values()
    assert steps["x"].tolist() == [100.0, 200.0]
    assert hours["x"].tolist() == [1.0, 2.0]
    assert gpu_hours["x"].tolist() == [2.0, 4.0]
    assert steps["iqm"].tolist() == [15.0, 20.0]
    assert steps["runs"].tolist() == [2, 1]
    assert np.array_equal(steps["low"], [10.0, math.nan], equal_nan=True)
    assert complete["iqm"].tolist() == [15.0, 25.0]
    assert complete["high"].tolist() == [20.0, 30.0]


def test_all_tasks_are_on_one_scale():
    """Random has 0 and the best finished run 1; a task on which one value has nothing is left out, and said."""
    runs = [*runs_of("mlp", [49.0, 24.0]), *runs_of("residual", [99.0, 99.0])]
    runs += [*runs_of("mlp", [0.0, 0.0], "hopper"), *runs_of("residual", [999.0, 499.0], "hopper")]
    runs += [*runs_of("mlp", [5.0], "halfcheetah", status="failed"), *runs_of("residual", [6.0], "halfcheetah")]
    result = compare(pair_runs(runs, "model"))
    rows = {row.arm: row for row in result.rows if row.env == ALL_TASKS}
    assert rows["mlp"].finished == 4
    assert rows["mlp"].peak is not None
    assert rows["mlp"].peak.value == pytest.approx((0.25 + 0.001) / 2)  # of 0.5, 0.25, 0.001, 0.001
    assert rows["residual"].peak is not None
    assert rows["residual"].peak.value == pytest.approx(1.0)  # of 1, 1, 1, 0.5
    assert any(note.startswith("halfcheetah is not in 'all tasks'") for note in result.notes)


# A comparison as text, CSV and LaTeX ----------------------------------------------------------------------------------


@pytest.fixture
def comparison() -> Comparison:
    one = Estimate(-150.04, math.nan, math.nan, 1)
    three = Estimate(-120.25, -130.0, -110.5, 3)
    rows = [
        Row("walker_run", "flow_v2", 1, 2, 0, final=one, peak=one, env_steps=Estimate(12800, 12800, 12800, 3)),
        Row("walker_run", "mlp", 3, 0, 0, final=three, peak=three, difference=Estimate(29.79, 1.0, 60.0, 3)),
        Row("a&b", "flow_v2", 0, 0, 1, final=None, peak=None),
    ]
    names = {"env": "walker_run", "arm": "mlp", "axis": "hours"}
    values = {"x": [1.0, 2.0], "iqm": [10.0, 20.0], "low": [5.0, math.nan], "high": [20.0, 40.0], "runs": [3, 1]}
    curves = pd.DataFrame({**{name: [value] * 2 for name, value in names.items()}, **values})
    return Comparison("model", ["flow_v2", "mlp"], rows, curves, ["100 % of it said"])


def test_table(comparison):
    table = compare_table(comparison)
    assert table.head[:8] == [
        "env", "model", "finished", "failed", "open", "final IQM", "peak IQM", "final IQM - flow_v2",
    ]  # fmt: skip
    assert table.rows[0] == ["walker_run", "flow_v2", "1", "2", "0", "-150.0", "-150.0", "-", "12,800", "-", "-"]
    assert table.rows[1][5:8] == ["-120.2 [-130.0, -110.5]", "-120.2 [-130.0, -110.5]", "29.8 [1.0, 60.0]"]
    assert table.rows[2][2:8] == ["0", "0", "1", "-", "-", "-"]


def test_csv_has_full_precision_and_empty_cells(comparison):
    rows = list(csv.DictReader(io.StringIO(compare_csv(comparison))))
    assert [row["model"] for row in rows] == ["flow_v2", "mlp", "flow_v2"]
    assert (rows[0]["failed"], rows[0]["final_iqm"], rows[0]["final_low"], rows[0]["final_runs"]) == (
        "2",
        "-150.04",
        "",
        "1",
    )
    assert (rows[1]["difference_low"], rows[1]["difference_high"]) == ("1.0", "60.0")
    assert (rows[2]["final_iqm"], rows[2]["final_runs"]) == ("", "0")


def test_curves_as_csv(comparison):
    rows = list(csv.DictReader(io.StringIO(curves_csv(comparison))))
    assert rows[0] == {
        "env": "walker_run", "model": "mlp", "axis": "hours", "x": "1.0", "iqm": "10.0", "low": "5.0", "high": "20.0",
        "runs": "3",
    }  # fmt: skip
    assert (rows[1]["low"], rows[1]["runs"]) == ("", "1")


def test_latex(comparison):
    lines = compare_tex(comparison).splitlines()
    assert lines[1] == "% 100 % of it said"
    body = [line for line in lines if line.endswith("\\\\")]
    assert body == [
        "Task & model & seeds & final return & peak return & final return $-$ flow\\_v2 \\\\",
        "walker\\_run & flow\\_v2 & 1 of 3 & $-150.0$ & $-150.0$ & -- \\\\",
        " & mlp & 3 of 3 & $-120.2$ [$-130.0$, $-110.5$] & $-120.2$ [$-130.0$, $-110.5$] & $29.8$ [$1.0$, $60.0$] \\\\",
        "a\\&b & flow\\_v2 & 0 of 1 & -- & -- & -- \\\\",
    ]
    assert sum(line == "\\midrule" for line in lines) == 2
    assert all(line.count("&") - line.count("\\&") == 5 for line in body)
