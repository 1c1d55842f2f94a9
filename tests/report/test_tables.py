"""Tables as text."""

from __future__ import annotations

import math
from collections import Counter

import pytest

pytest.importorskip("hydra")

from report_cases import report

from pwm_torchrl.report.run_tables import (
    frame_of,
    group_runs,
    group_table,
    held_out_table,
    memory_table,
    reasons_text,
    run_table,
    seeds_text,
)
from pwm_torchrl.report.tables import Table, bytes_text, duration, fit_names, number_text

GIB = 2**30


def test_columns_are_aligned_and_wide_ones_left_out():
    table = Table(["run", "seed", "why"], [["a", "1", "x" * 99], ["long name", "100", ""]], frozenset({"why"}))
    assert table.text().splitlines() == ["run        seed", "---------  ----", "a             1", "long name   100"]


class TestNarrow:
    table = Table(
        ["run", "restarts", "final", "time", "why"],
        [["a_long_name", "0", "1.0", "5 s", "-"], ["b", "0", "-20.0", "1 min", "words that wrap around"]],
        narrow=("why", "time", "run"),
        below={"why": "because ", "run": ""},
    )

    def test_as_wide_as_it_needs(self):
        assert self.table.text(80) == self.table.text()
        assert self.table.text().splitlines()[0].split() == self.table.head

    def test_what_says_nothing_goes_first_then_long_words(self):
        assert self.table.text(30).splitlines() == [
            "run          final   time",
            "-----------  -----  -----",
            "a_long_name    1.0    5 s",
            "b            -20.0  1 min",
            "  because words that wrap",
            "    around",
        ]

    def test_what_is_left_out_is_named(self):
        lines = self.table.text(20).splitlines()
        assert lines[0].split() == ["run", "final"]
        assert "time" in lines[-1]

    def test_a_name_below_its_row(self):
        lines = self.table.text(12).splitlines()
        assert lines[:4] == ["final", "-----", "  1.0", "  a_long_name"]


def test_names_of_runs_in_few_columns():
    names = ["pendulum_mlp_tiny_s0_20261128-184840", "pendulum_mlp_tiny_s1_20261128-184841_2"]
    assert fit_names(names, 40) == names
    assert fit_names(names, 30) == ["pendulum_mlp_tiny_s0", "pendulum_mlp_tiny_s1"]
    again = [names[0], names[0].replace("184840", "190000")]
    shown = fit_names(again, 26)
    assert [len(name) for name in shown] == [26, 26]
    assert [name[-6:] for name in shown] == ["184840", "190000"]
    assert fit_names(["abcdef1", "abcxyf1"], 4) == ["abcdef1", "abcxyf1"]  # could not be told apart


def test_one_row_per_run():
    run = report(
        "seed=3", "training.epochs=40", status="failed", epochs_done=12, peak_return=-123.45,
        restarts=Counter(timeout=2), wall_clock_s=95.0, host_bytes=3 * GIB, last_error="boom",
    )  # fmt: skip
    table = run_table([run])
    assert table.rows == [
        ["residual", "tiny", "pendulum", "3", "-123.5", "-", "-", "12/40", "failed", "2: timeout", "1 min 35 s",
         "3 GiB", "-", "pendulum_residual_3", "boom"]
    ]  # fmt: skip
    assert "boom" not in table.text()


def test_links_to_what_a_run_has(tmp_path):
    run = report(name="a b")
    run.path = tmp_path / "runs" / "a b"
    run.path.mkdir(parents=True)
    for name in ("config.yaml", "video.mp4"):
        (run.path / name).touch()
    run.wandb_url = "https://wandb.ai/1"
    assert run_table([run], tmp_path / "page").links["files"] == [[
        ("directory", "../runs/a%20b/"), ("configuration", "../runs/a%20b/config.yaml"),
        ("video", "../runs/a%20b/video.mp4"), ("W&B", "https://wandb.ai/1"),
    ]]  # fmt: skip
    assert run_table([run]).links == {}


def test_held_out_errors_by_task():
    """At the epoch of the lowest validation loss, whose weights are kept; means over seeds."""

    def pretrained(seed, latent):
        made = report(f"seed={seed}", "model=mlp")
        made.metrics = {
            "epoch": [1.0, 2.0, 3.0, 4.0], "validation/loss": [2.0, math.nan, 0.5, 1.0],
            "validation/latent_mse": [9.0, math.nan, latent, 9.0], "validation/reward_nmse": [9.0, math.nan, 0.25, 9.0],
            "validation/latent_mse/walker-walk": [9.0, math.nan, 2 * latent, 9.0],
        }  # fmt: skip
        return made

    table = held_out_table([pretrained(0, 1.0), pretrained(1, 3.0), report()])
    assert table is not None
    assert table.head == ["task", "mlp tiny: latent MSE", "mlp tiny: reward NMSE"]
    assert table.rows == [["mean", "2 ± 1", "0.25 ± 0"], ["walker-walk", "4 ± 2", "-"]]
    assert held_out_table([report()]) is None


def test_one_row_per_group():
    runs = [report(f"seed={s}", "training.epochs=40", final_return=r, host_bytes=b * GIB, wall_clock_s=60.0 * b)
            for s, r, b in ((0, 1.0, 1), (1, 3.0, 3))]  # fmt: skip
    runs.append(report("seed=2", "training.epochs=40", status="memory", epochs_done=7, restarts=Counter(memory=1)))
    table = group_table(group_runs(runs))
    assert table.rows == [
        ["residual", "tiny", "pendulum", "3: 0-2", "-", "2.0 ± 1.0 (2 of 3)", "7-40/40", "2 finished, 1 memory",
         "1: memory", "2 min 00 s", "3 GiB", "-"]
    ]  # fmt: skip
    runs.append(report("seed=0", "training.epochs=40", "algorithm.horizon=8"))
    assert [row[-1] for row in group_table(group_runs(runs)).rows] == ["algorithm.horizon=3", "algorithm.horizon=8"]


def test_numbers_behind_the_cells():
    """What a page sorts by: 9 before 10, a minute before an hour, unknown values last."""
    runs = [
        report(peak_return=9.0, wall_clock_s=3600.0),
        report("seed=1", peak_return=10.0, wall_clock_s=60.0),
        report("seed=2"),
    ]
    keys = run_table(runs).keys
    assert keys["peak"] == [9.0, 10.0, None]
    assert keys["time"] == [3600.0, 60.0, None]
    assert group_table(group_runs(runs)).keys["peak"] == [9.5]


def test_no_gpu_memory_is_unknown_and_not_zero():
    frame = frame_of([report(device_bytes=0), report("seed=1", device_bytes=5)])
    assert frame["GPU"].isna().tolist() == [True, False]


def test_memory_beside_plans():
    on_gpu = report(host_bytes=GIB, host_planned=2 * GIB, device_bytes=3 * GIB, device_planned=4 * GIB)
    on_cpu = report("model=mlp", host_planned=2 * GIB, device_bytes=0)
    table = memory_table([on_gpu, on_cpu, report("seed=1", host_bytes=GIB)])
    assert table.head[1:] == [
        "host measured", "host predicted", "host share", "GPU measured", "GPU predicted", "GPU share",
    ]  # fmt: skip
    assert [row[1:] for row in table.rows] == [
        ["1 GiB", "2 GiB", "50%", "3 GiB", "4 GiB", "75%"],
        ["-", "2 GiB", "-", "-", "-", "-"],
    ]
    assert len(memory_table([on_cpu]).head) == 4
    assert memory_table([report()]).rows == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.8, "1 h 00 min"), (7500, "2 h 05 min"),
     (86399, "1 d 00 h"), (266400, "3 d 02 h")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_other_words():
    assert reasons_text(Counter()) == "0"
    assert reasons_text(Counter(node_failure=2)) == "2: node failure"
    assert reasons_text(Counter(timeout=2, start_up=1)) == "3: 2 timeout, 1 start-up"
    assert seeds_text([0, 1, 2, 7, 9, 10]) == "6: 0-2, 7, 9, 10"
    assert seeds_text([None]) == "1"
    assert number_text(float("nan")) == "-"
    assert bytes_text(None) == "-"
