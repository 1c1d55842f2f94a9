"""Experiment presets: their settings, their sizes, and two epochs on the stand-in simulator with small batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pwm_torchrl.algorithm.build import Facts, build_world_model
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.modules import count_parameters
from pwm_torchrl.run.metrics import read_metrics
from pwm_torchrl.training import train

SIZES = ("5m", "48m")
MODELS = ("mlp", "residual", "flow_v1", "flow_v2", "flow_v3")
SMALL = (
    "env.module=dflex_stand_in",
    "env.num_envs=4",
    "algorithm.model_batch=4",
    "algorithm.actor_batch=2",
    "algorithm.model_updates=1",
    "algorithm.first_model_updates=1",
    "training.epochs=2",
    "training.eval_every=0",
    "training.eval_episodes=1",
    "training.replay_capacity=1000",
    "training.video=false",
    "training.progress=false",
)
#: Of the 16 steps that are asserted above, four take a quarter of the time, and the same path.
SHORT = ("algorithm.horizon=4",)


def preset(size: str, model: str) -> str:
    return f"experiment=dflex_ant_{size}_{model}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_carries_the_published_settings(size: str, model: str) -> None:
    cfg = compose([preset(size, model)])
    flow = model.startswith("flow")
    assert cfg.algorithm.horizon == 16
    assert cfg.algorithm.model_batch == {"5m": 256, "48m": 1024}[size]
    assert cfg.training.epochs == (20_000 if flow and size == "48m" else 15_000)
    assert cfg.env["name"] == "dflex_ant"
    assert cfg.size.name == size
    dynamics = cfg.model.dynamics
    if flow:
        assert (dynamics.solver, dynamics.substeps) == {
            "flow_v1": ("heun", 2),
            "flow_v2": ("heun", 4),
            "flow_v3": ("euler", 8),
        }[model]
    else:
        assert dynamics.kind == model


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_has_the_published_number_of_parameters(size: str, model: str) -> None:
    with torch.device("meta"):  # nothing is allocated
        built = build_world_model(compose([preset(size, model)]), Facts(37, 8, False))
    expected = {"5m": 1_469_953, "48m": 18_489_089}[size]
    counted = sum(count_parameters(m) for m in (built.encoder, built.dynamics, built.reward))
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "model"), [("5m", "mlp"), ("5m", "flow_v2"), ("48m", "flow_v2")]
)  # the other sizes and solvers are the same path
def test_trains_two_epochs_in_micro_batches(size: str, model: str, tmp_path: Path) -> None:
    cfg = compose([preset(size, model), *SMALL, "memory.model_micro_batch=2", *SHORT, f"run_dir={tmp_path}"])
    summary = train(cfg, tmp_path)
    assert (summary["status"], summary["epochs_done"]) == ("finished", 2)
    columns = read_metrics(tmp_path / "metrics.csv")
    assert all(math.isfinite(columns[f"loss/{name}"][-1]) for name in ("model", "actor", "critic"))
