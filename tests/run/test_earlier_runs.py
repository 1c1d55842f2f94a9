"""A run of an earlier version (checkpoint schema 2, other names of networks, keys and metrics) is still of use."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

from pwm_torchrl import load_policy, load_world_model
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.run.metrics import read_metrics
from pwm_torchrl.training import evaluate_run

report = partial(run_command, "report")

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_schema_2.tar.xz"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_its_keys_have_their_present_names(run):
    algorithm = load_config(run).algorithm
    assert (algorithm.actor_batch, algorithm.actor_updates) == (8, 1)
    assert algorithm.actor_betas == algorithm.critic_betas == [0.7, 0.95]


def test_its_metrics_have_their_present_names(run):
    metrics = read_metrics(run / "metrics.csv")
    assert {"loss/model", "loss/actor", "loss/critic", "lr/critic", "grad_norm/critic"} <= metrics.keys()
    assert "loss/value" not in metrics


def test_its_policy_acts(run):
    observation = torch.randn(5, 3)
    policy, world_model = load_policy(run), load_world_model(run)
    action = policy(observation)
    assert (action[-1] if isinstance(action, tuple) else action).shape == (5, 1)
    assert world_model is not None


def test_it_is_evaluated(run):
    result = evaluate_run(run, episodes=2)
    assert result["episodes"] == 2
    assert -400 < result["return_mean"] < 0


def test_it_is_reported(run, tmp_path, capsys):
    assert report([str(run.parent), "--out", str(tmp_path / "page")]) == 0
    assert "pendulum" in capsys.readouterr().out
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "finished" in page
    assert "-126.1" in page.replace("\N{MINUS SIGN}", "-")


def test_resuming_it_is_refused_with_the_reason(run, capsys):
    from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore, load_checkpoint

    path = CheckpointStore(run).latest()
    with pytest.raises(CheckpointFault, match="schema version 2"):
        load_checkpoint(path, {"loop": object()})
