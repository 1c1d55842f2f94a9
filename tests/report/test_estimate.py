"""Parameters and hours of a run that has not started."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("hydra")

from report_cases import config, write_run

from pwm_torchrl.config import AlgorithmConfig
from pwm_torchrl.report.estimate import cost_lines, earlier_duration, operations, parameter_counts, predicted_duration
from pwm_torchrl.run.stored_episodes import run_facts

HERE = "a CPU, 2 threads"


@pytest.fixture(scope="module")
def facts():
    return run_facts(config("model=mlp"))


def earlier(folder, name, *words, seconds, hardware=HERE, count=10):
    run = write_run(folder / name, *words, hardware=hardware, status="finished")
    rows = [
        f"{epoch},{100.0 if epoch == 1 else seconds}" for epoch in range(1, count + 1)
    ]  # the first one takes longer
    (run / "metrics.csv").write_text("epoch,time/epoch_s\n" + "\n".join(rows) + "\n")


def asked(folder, *words):
    cfg = config("model=mlp", "training.epochs=3600", *words)
    cfg.runs_dir = str(folder)
    return cfg


def test_hours_of_earlier_runs_of_this_size_on_this_hardware(tmp_path):
    assert earlier_duration(asked(tmp_path / "nowhere"), HERE) is None
    assert earlier_duration(asked(tmp_path), HERE) is None
    earlier(tmp_path, "a", "model=mlp", "seed=1", "algorithm.actor_lr=0.1", seconds=2.0)
    earlier(tmp_path, "b", "model=mlp", "seed=2", seconds=4.0)
    earlier(tmp_path, "other size", "model=mlp", "size=5m", seconds=50.0)
    earlier(tmp_path, "other updates", "model=mlp", "algorithm.horizon=8", seconds=50.0)
    earlier(tmp_path, "other hardware", "model=mlp", seconds=50.0, hardware="NVIDIA H200")
    earlier(tmp_path, "too short", "model=mlp", seconds=50.0, count=3)
    found = earlier_duration(asked(tmp_path), HERE)
    assert found is not None
    assert found.hours == pytest.approx(3.0)
    assert "2 earlier runs" in found.source
    assert HERE in found.source
    assert earlier_duration(asked(tmp_path, "model=flow_v2"), HERE) is None


def test_runs_of_other_environments_count_where_there_are_no_others(tmp_path):
    for name in ("one", "two"):
        cfg = config("model=mlp")
        cfg.env = {**cfg.env, "name": name}
        run = write_run(tmp_path / name, "model=mlp", hardware=HERE)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: pendulum", f"name: {name}"))
        (run / "metrics.csv").write_text("epoch,time/epoch_s\n" + "".join(f"{e},5\n" for e in range(9)))
    found = earlier_duration(asked(tmp_path), HERE)
    assert found is not None
    assert found.hours == pytest.approx(5.0)
    assert "other environments" in found.source


def test_parameters_are_those_of_the_published_sizes(facts):
    """DESIGN's count for O = 37, A = 8, scalar reward, without termination head."""
    sized = replace(facts, observation_dim=37, action_dim=8, terminates=False)
    assert parameter_counts(config("model=mlp", "size=5m"), sized)["model"] == 1_469_953
    assert parameter_counts(config("model=mlp", "size=48m"), sized)["model"] == 18_489_089


def test_operations_grow_with_what_is_computed(facts):
    base, flow = (config(f"model={name}", "algorithm=pwm_paper") for name in ("mlp", "flow_v2"))

    def of(cfg=base, **changes):
        return operations(replace(cfg, algorithm=replace(cfg.algorithm, **changes)), facts)

    assert isinstance(base.algorithm, AlgorithmConfig)
    only_model = 2 * of(actor_updates=1) - of(actor_updates=2)
    twice = {"model_updates": 2 * base.algorithm.model_updates}
    assert 2 * of(actor_updates=1, **twice) - of(actor_updates=2, **twice) == pytest.approx(2 * only_model)
    assert of(actor_updates=3) - only_model == pytest.approx(3 * (of(actor_updates=1) - only_model))
    # Seven evaluations of the dynamics for one, beside the reward.
    assert 3 < (2 * of(flow, actor_updates=1) - of(flow, actor_updates=2)) / only_model < 7


def test_without_earlier_runs_arithmetic_is_a_lower_bound(tmp_path, facts):
    cfg = asked(tmp_path)
    cpu = torch.device("cpu")
    found = predicted_duration(cfg, facts, cpu)
    assert found.lower_bound
    assert found.hours > 0
    assert any("at least" in line for line in cost_lines(cfg, facts, HERE, cpu))
    elsewhere = cost_lines(cfg, facts, "h200", None)
    assert "unknown" in elsewhere[1]
    assert "h200" in elsewhere[1]
    assert json.dumps(sum(parameter_counts(cfg, facts).values())) in elsewhere[0].replace(",", "")
