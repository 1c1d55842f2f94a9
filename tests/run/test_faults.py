"""What goes wrong during a run: one sentence, and a checkpoint that it can go on from."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from training_cases import CLOCKWORK, config, rows_of, run_with

from pwm_torchrl.errors import EnvironmentFault, StorageFault
from pwm_torchrl.run import checkpoints
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.training import train


def status(run_dir) -> str:
    return json.loads((run_dir / "summary.json").read_text())["status"]


class TestEnvironment:
    @pytest.mark.parametrize(
        ("fault", "problem"),
        [({"fail_at": 11}, "RuntimeError: the spring broke"), ({"nan_at": 11}, "observation is not finite")],
        ids=["raises", "nan"],
    )
    def test_stops_with_name_and_seed_after_a_checkpoint(self, fault, problem, tmp_path):
        """Step 11 is in the third epoch; no checkpoint would be due before the fourth."""
        cfg = config({"training.checkpoint_every": 4}, {**CLOCKWORK, **fault})
        with pytest.raises(EnvironmentFault, match=problem) as caught:
            train(cfg, tmp_path)
        message = str(caught.value)
        assert "environment clockwork" in message
        assert "seed 0" in message
        assert "\n" not in message
        assert status(tmp_path) == "failed"
        assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2"]
        assert int(CheckpointStore(tmp_path).latest().name.rpartition("-")[2]) == 2

    def test_the_checkpoint_resumes(self, tmp_path, monkeypatch):
        """With the environment repaired, from the last whole epoch and new episodes."""
        broken = config({"training.checkpoint_every": 1}, {**CLOCKWORK, "fail_at": 11})
        with pytest.raises(EnvironmentFault):
            train(broken, tmp_path)
        summary, run = run_with(monkeypatch, config(env=CLOCKWORK), tmp_path, resume=True)
        assert (summary["status"], summary["epochs_done"], summary["restarts"]) == ("finished", 4, 1)
        assert not summary["resume_exact"]
        assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2", "3", "4"]
        assert len(run.source.samples) == 32

    def test_in_the_first_epoch(self, tmp_path):
        """Nothing was learned: there is nothing to save."""
        with pytest.raises(EnvironmentFault, match="environment clockwork"):
            train(config(env={**CLOCKWORK, "fail_at": 2}), tmp_path)
        assert status(tmp_path) == "failed"
        assert CheckpointStore(tmp_path).latest() is None


class TestDivergence:
    @pytest.mark.parametrize("epoch", [3, 4], ids=["", "evaluated"])
    @pytest.mark.parametrize("network", ["model", "actor", "critic"])
    def test_a_loss_that_is_not_finite(self, network, epoch, tmp_path, monkeypatch):
        """The fourth epoch evaluates: the policy's NaN must not be blamed on the environment."""

        def spoil(run):  # between the collection and the updates of the epoch
            if run.loop.epoch == epoch - 1:
                next(getattr(run.networks, network).parameters()).data.fill_(torch.nan)

        cfg = config({"training.checkpoint_every": 1, "training.epochs": 6})
        with pytest.raises(FloatingPointError, match=rf"^(loss|grad_norm)/\w+ became nan in epoch {epoch}; ") as caught:
            run_with(monkeypatch, cfg, tmp_path, during_epoch=spoil)
        message = str(caught.value)
        assert "algorithm.*_lr" in message
        assert "\n" not in message
        assert status(tmp_path) == "failed"
        latest = CheckpointStore(tmp_path).latest()
        assert int(latest.name.rpartition("-")[2]) == epoch - 1

    def test_the_last_checkpoint_resumes(self, tmp_path, monkeypatch):
        def spoil(run):
            if run.loop.epoch == 2:
                run.networks.critic.params[0].data.fill_(torch.nan)

        cfg = config({"training.checkpoint_every": 1})
        with pytest.raises(FloatingPointError):
            run_with(monkeypatch, cfg, tmp_path, during_epoch=spoil)
        assert rows_of(tmp_path)[-1]["loss/critic"] == "nan"
        summary, run = run_with(monkeypatch, cfg, tmp_path, resume=True)
        assert (summary["status"], summary["epochs_done"]) == ("finished", 4)
        assert all(p.isfinite().all() for _, network in run.networks.items() for p in network.parameters())
        assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2", "3", "4"]
        assert "nan" not in rows_of(tmp_path)[2].values()


def test_any_other_error_leaves_a_failed_summary(tmp_path, monkeypatch):
    def fail(run):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run_with(monkeypatch, config(), tmp_path, after_epoch=fail)
    assert status(tmp_path) == "failed"


class TestDeletion:
    def test_an_old_checkpoint_that_cannot_be_deleted_is_tried_again(self, tmp_path, monkeypatch, capsys):
        """As on a file server on which somebody still has a file of it open."""
        rmtree, refused = shutil.rmtree, []

        def delete(path, *args, **kwargs):
            if len(refused) < 4 and ".deleted" in str(path):
                refused.append(path)
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
            rmtree(path, *args, **kwargs)

        monkeypatch.setattr(checkpoints.shutil, "rmtree", delete)
        summary = train(config({"training.epochs": 8, "training.checkpoint_every": 1}, CLOCKWORK), tmp_path)
        assert summary["status"] == "finished"
        assert len(refused) == 4
        told = [line for line in capsys.readouterr().err.splitlines() if "could not be deleted" in line]
        assert len(told) == len(set(refused))
        assert not list(tmp_path.glob("checkpoints/*/.*"))
        assert len(CheckpointStore(tmp_path).paths()) in (2, 3)

    @pytest.mark.parametrize("every", [0, 1])
    def test_of_the_runs_directory_between_epochs(self, every, tmp_path, monkeypatch):
        def delete(run) -> None:
            if run.loop.epoch == 2:
                shutil.rmtree(tmp_path / "run")

        cfg = config({"training.checkpoint_every": every}, CLOCKWORK)
        with pytest.raises(StorageFault, match="was deleted or moved during the run") as ended:
            run_with(monkeypatch, cfg, tmp_path / "run", after_epoch=delete)
        assert "\n" not in str(ended.value)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_of_the_runs_directory_while_it_saves(self, when, tmp_path, monkeypatch):
        seal = checkpoints.seal

        def delete(folder) -> None:
            if when == "after":
                seal(folder)
            shutil.rmtree(tmp_path / "run")
            if when == "before":
                seal(folder)

        monkeypatch.setattr(checkpoints, "seal", delete)
        with pytest.raises(StorageFault, match="was deleted or moved"):
            run_with(monkeypatch, config(env=CLOCKWORK), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_of_what_another_directory_has_taken_the_place(self, tmp_path, monkeypatch):
        def swap(run) -> None:
            os.rename(tmp_path / "run", tmp_path / "moved")
            (tmp_path / "run").mkdir()

        with pytest.raises(StorageFault, match="Resume the run where it was moved to"):
            run_with(monkeypatch, config(env=CLOCKWORK), tmp_path / "run", after_epoch=swap)
        assert not list((tmp_path / "run").iterdir())
