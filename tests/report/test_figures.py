"""What the figures show."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("hydra")
pytest.importorskip("matplotlib")

from report_cases import report

from pwm_torchrl.report import figures
from pwm_torchrl.report.compare import compare
from pwm_torchrl.report.run_tables import group_runs
from pwm_torchrl.report.select import pair_runs
from pwm_torchrl.run.drawing import png

GIB = 2**30


def run(*words, upto=5, **known):
    made = report(*words, **known)
    steps = [100.0 * n for n in range(1, upto + 1)]
    made.metrics = {
        "env_steps": steps,
        "wall_clock_s": steps,
        "eval/return_mean": [-1000.0 + s + made.seed for s in steps],
        "loss/model": [1 / s for s in steps],
        "loss/actor": [math.nan, *(-s for s in steps[1:])],
    }
    return made


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bands(axis):
    return len(axis.collections)


def test_runs_without_environment_steps_are_drawn_over_epochs():
    """Pre-training and extraction learn from stored episodes: over environment steps they would be a single point."""
    offline = [run(f"model={model}", "seed=0") for model in ("mlp", "residual")]
    for each in offline:
        each.metrics |= {"epoch": [10.0, 20.0, 30.0, 40.0, 50.0], "env_steps": [0.0] * 5}
    (returns,) = figures.returns_figures(group_runs(offline))
    losses = figures.column_figures(group_runs(offline), "loss/")["pendulum"]
    comparison = figures.comparison_figures(compare(pair_runs(offline, "model")))["pendulum"]
    for axis in (returns.axes[0], losses.axes[0], comparison.axes[0]):
        assert axis.get_xlabel() == "epochs"
        assert axis.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50]


def test_a_line_per_model_and_a_panel_per_environment():
    runs = [run("model=mlp", "seed=0"), run("model=mlp", "seed=2", upto=3), run("model=residual", "seed=0")]
    runs.append(run("model=mlp", "env=hopper", "seed=0"))
    (figure,) = figures.returns_figures(group_runs(runs))
    hopper, pendulum = (axis for axis in figure.axes if axis.get_visible())
    assert (hopper.get_title(loc="left"), pendulum.get_title(loc="left")) == ("hopper", "pendulum")
    assert labels(figure) == ["mlp tiny", "residual tiny"]
    assert (bands(hopper), bands(pendulum)) == (0, 1)  # a single seed has no band
    whole, strong = pendulum.lines[:2]
    assert whole.get_ydata().tolist() == [-899, -799, -699, -600, -500]
    assert np.isfinite(strong.get_ydata()).tolist() == [True] * 3 + [False] * 2  # where both seeds reach
    assert hopper.lines[0].get_color() == pendulum.lines[0].get_color()


def test_returns_while_collecting_stand_in_for_evaluations():
    made = run("model=mlp")
    made.metrics["train/return"] = made.metrics.pop("eval/return_mean")
    (figure,) = figures.returns_figures(group_runs([made]))
    assert figure.axes[0].get_ylabel() == "return while collecting"
    assert figures.returns_figures(group_runs([report()])) == []


def test_losses_of_each_environment():
    runs = [run("model=mlp"), run("model=mlp", "env=hopper")]
    drawn = figures.column_figures(group_runs(runs), "loss/")
    assert list(drawn) == ["hopper", "pendulum"]
    model, actor = (axis for axis in drawn["hopper"].axes if axis.get_visible())
    assert (model.get_title(loc="left"), actor.get_title(loc="left")) == ("model", "actor")
    assert model.get_yscale() == "linear"  # 1/100 to 1/500
    assert figures.column_figures(group_runs([report()]), "loss/") == {}


def test_many_environments_do_not_have_pictures_of_their_own():
    groups = group_runs([run("model=mlp"), run("model=mlp", "env=hopper")])
    assert len(figures.column_figures(groups, "loss/", most=1)) == 1
    assert len(figures.returns_figures(groups, most=1)) == 2  # pages


def test_a_long_name_stays_in_its_panel():
    name = "metaworld_" + "very_" * 9 + "long-v3"
    assert len(figures._short(name)) == 30
    assert figures._short(name).startswith("metaworld_very_…")
    assert figures._short(name).endswith("long-v3")
    assert figures._short("pendulum") == "pendulum"


def test_memory_of_the_run_that_holds_most():
    runs = [
        report("seed=0", host_bytes=1 * GIB, host_planned=4 * GIB),
        report("seed=1", host_bytes=3 * GIB, host_planned=5 * GIB, device_bytes=2 * GIB),
        report("model=mlp", host_bytes=2 * GIB),
        report("model=flow_v1"),
    ]
    figure = figures.memory_figure(group_runs(runs))
    figure.canvas.draw()
    host, device = figure.axes
    assert [bar.get_width() for bar in host.patches] == [2, 3]
    assert [tick.get_text() for tick in host.get_yticklabels()] == ["pendulum mlp tiny", "pendulum residual tiny"]
    assert [segment[0][0] for segment in host.collections[0].get_segments()] == [5]
    assert [bar.get_width() for bar in device.patches] == [2]
    assert figures.memory_figure(group_runs([report()])) is None


def test_comparisons_over_what_there_is():
    runs = [run(f"model={model}", f"seed={seed}") for model in ("mlp", "residual") for seed in (0, 1)]
    drawn = figures.comparison_figures(compare(pair_runs(runs, "model", "residual")))
    assert list(drawn) == ["pendulum"]
    axes = [axis for axis in drawn["pendulum"].axes if axis.get_visible()]
    assert [axis.get_xlabel() for axis in axes] == ["environment steps", "wall-clock hours"]
    assert labels(drawn["pendulum"]) == ["residual", "mlp"]
    assert [bands(axis) for axis in axes] == [2, 2]


def test_more_lines_than_colours_have_dashes():
    style = figures._Styles([str(n) for n in range(10)])
    looks = {(style[str(n)]["color"], style[str(n)]["linestyle"]) for n in range(10)}
    assert len(looks) == 10


def test_pictures_are_png():
    (figure,) = figures.returns_figures(group_runs([run("model=mlp")]))
    assert png(figure).startswith(b"\x89PNG")
