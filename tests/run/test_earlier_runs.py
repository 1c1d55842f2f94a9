"""Runs of earlier versions are still of use.

Checkpoint schema 2 had other names of networks, keys and metrics; schema 3 a file for every tensor.
"""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

from pwm_torchrl import load_policy, load_world_model
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.run.metrics import read_metrics
from pwm_torchrl.training import evaluate_run, train

report = partial(run_command, "report")

#: Of the schema-3 run's last policy in the version that saved it.
EARLIER_RETURNS = [-1590.9960609674454, -1201.6085637807846]
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return unpacked("run_schema_2.tar.xz", tmp_path)


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


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


class TestSchema3:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        return unpacked("run_schema_3.tar.xz", tmp_path)

    def test_its_policy_is_evaluated(self, run):
        result = evaluate_run(run, episodes=2, which="last")
        assert result["epoch"] == 1
        assert result["returns"] == pytest.approx(EARLIER_RETURNS, abs=1e-2)

    def test_its_run_goes_on_and_saves_one_file_per_component(self, run):
        cfg = load_config(run)
        cfg.training.epochs = 2
        summary = train(cfg, run, resume=True)
        assert (summary["status"], summary["epochs_done"], summary["resume_exact"]) == ("finished", 2, True)
        assert read_metrics(run / "metrics.csv")["epoch"] == [1, 2]
        newest = CheckpointStore(run).latest()
        assert newest is not None
        files = [file for file in newest.rglob("*") if file.is_file()]
        components = [file for file in files if file.parent != newest]
        assert {file.name for file in components} == {"state.safetensors"}
        assert len({file.parent for file in components}) == len(components)
        assert len(files) == len(components) + 2  # the manifest and the checksums
