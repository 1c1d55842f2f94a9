"""A comparison as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math

import pandas as pd
import pytest

pytest.importorskip("hydra")

from pwm_torchrl.report.compare import (
    Comparison,
    Row,
    compare_csv,
    compare_table,
    compare_tex,
    curves_csv,
)
from pwm_torchrl.report.statistics import Estimate


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
