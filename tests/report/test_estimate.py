"""Parameters and hours of a run that has not started."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields, replace

import pytest
import torch

pytest.importorskip("hydra")

from report_cases import config, write_run

from pwm_torchrl.config import AlgorithmConfig, Config
from pwm_torchrl.report import estimate
from pwm_torchrl.report.estimate import cost_lines, earlier_duration, operations, parameter_counts, predicted_duration
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.run.stored_episodes import run_facts

HERE = "a CPU, 2 threads"


@pytest.fixture(scope="module")
def facts():
    return run_facts(config("model=mlp"))


EPOCHS = "training.epochs=3600"


def earlier(folder, name, *words, seconds, hardware=HERE, count=10):
    run = write_run(folder / name, EPOCHS, *words, hardware=hardware, status="finished")
    rows = [
        f"{epoch},{100.0 if epoch == 1 else seconds}" for epoch in range(1, count + 1)
    ]  # the first one takes longer
    (run / "metrics.csv").write_text("epoch,time/epoch_s\n" + "\n".join(rows) + "\n")


def asked(folder, *words):
    cfg = config("model=mlp", EPOCHS, *words)
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
        run = write_run(tmp_path / name, "model=mlp", EPOCHS, hardware=HERE)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: pendulum", f"name: {name}"))
        (run / "metrics.csv").write_text("epoch,time/epoch_s\n" + "".join(f"{e},5\n" for e in range(9)))
    found = earlier_duration(asked(tmp_path), HERE)
    assert found is not None
    assert found.hours == pytest.approx(5.0)
    assert "other environments" in found.source


def changed(cfg, values):
    """A configuration with other values of dotted keys."""
    for key, value in values.items():
        *sections, leaf = key.split(".")
        if sections == ["env"]:
            cfg.env = {**cfg.env, leaf: value}
        else:
            setattr(functools.reduce(getattr, sections, cfg), leaf, value)
    return cfg


def compared(folder, values):
    """The estimate for a run from an earlier one of two seconds per epoch that differs in some values."""
    run = folder / "run"
    run.mkdir()
    save_config(changed(config("model=mlp", EPOCHS), values), run)
    (run / "summary.json").write_text(json.dumps({"hardware": HERE}))
    (run / "metrics.csv").write_text("epoch,time/epoch_s\n" + "".join(f"{e},2\n" for e in range(9)))
    return earlier_duration(asked(folder), HERE)


@pytest.mark.parametrize(
    "values",
    [
        {"algorithm.updates_per_step": 0.25},
        {"algorithm.updates_per_step": 4.0, "algorithm.max_updates": 999},
        {"algorithm.max_updates": 8},
        {"algorithm.critic_batch": 4096},
        {"algorithm.slice_steps": 50},
        {"algorithm.collect_steps": 17},
        {"algorithm.state_std": False},
        {"algorithm.name": "pwm_paper"},
        {"algorithm.compile": False},
        {"training.precision": "bf16"},
        {"training.replay_storage": "disk"},
        {"training.eval_every": 1},
        {"model.loss.one_step_weight": 0.0},
        {"model.dynamics.kind": "residual"},
        {"size.critic_units": [999]},
        {"memory.model_micro_batch": 1},
        {"cluster.gpus": 2},
        {"env.num_envs": 9},
        {"env.action_repeat": 2},
        {"env._target_": "my_package.make_env"},
        {"env.unheard_of": 1},
    ],
    ids=str,
)
def test_a_run_whose_epochs_do_something_else_tells_nothing(tmp_path, values):
    assert compared(tmp_path, values) is None


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 5, "algorithm.gamma": 0.9, "algorithm.actor_betas": [0.5, 0.9], "model.loss.rho": 0.5},
        {"training.epochs": 3000, "training.video": False, "runs_dir": "elsewhere"},
        {"model.loss.one_step_weight": 0.5},
        {"algorithm.max_updates": 999},  # 64 sets, as before
        {"algorithm.model_updates": 999},  # nothing reads it
        {"algorithm.compile": True},  # as "auto" does in a run of this length
        {"cluster.partition": "gpu", "cluster.gpus": 1, "logger.project": "x"},
    ],
    ids=str,
)
def test_a_run_whose_epochs_do_the_same_is_an_example(tmp_path, values):
    found = compared(tmp_path, values)
    assert found is not None
    assert found.hours == pytest.approx(2.0)
    assert "other environments" not in found.source


def test_on_a_gpu_auto_never_compiles(tmp_path):
    assert compared(tmp_path, {"training.epochs": 10}) is None
    assert earlier_duration(asked(tmp_path), HERE, "cuda") is not None


def test_a_key_of_a_later_version_counts():
    @dataclass
    class Later(AlgorithmConfig):
        unheard_of: int = 1

    cfg = config("model=mlp")
    later = [replace(cfg, algorithm=Later(**asdict(cfg.algorithm), unheard_of=number)) for number in (1, 2)]
    one, other = (estimate._timed(estimate._settings(each)) for each in later)
    assert one != other


def test_the_keys_that_do_not_count_are_keys():
    settings = estimate._settings(config())
    known = {*settings, *(f"{key.name}." for key in fields(Config))}
    assert not {*estimate._UNTIMED} - known
    assert {key for key in estimate._UNTIMED if key.endswith(".")} == {"cluster.", "logger."}


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
