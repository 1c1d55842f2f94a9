"""PWMTrainer: TorchRL's hooks work on it, and nothing that they log is kept."""

from __future__ import annotations

import gc
import weakref

import torch
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import LogScalar
from training_cases import config, rows_of, run_with

from pwm_torchrl.training.collector import ResumableCollector


def test_is_torchrls(tmp_path, monkeypatch):
    _, run = run_with(monkeypatch, config({"training.epochs": 1}), tmp_path)
    assert isinstance(run.trainer, Trainer)
    assert isinstance(run.trainer.collector, ResumableCollector)


def test_what_hooks_log_enters_the_row_of_their_epoch(tmp_path, monkeypatch):
    seen = []

    def register(run):
        if run.loop.epoch == 1:
            LogScalar(key=("next", "reward"), logname="hook/reward").register(run.trainer, "hook")
            run.trainer.register_op("pre_steps_log", lambda batch: seen.append(batch["next", "reward"].mean().item()))

    run_with(monkeypatch, config(), tmp_path, after_epoch=register)
    logged = [row["hook/reward"] for row in rows_of(tmp_path)]
    assert logged[0] == ""
    assert [float(value) for value in logged[1:]] == seen


def test_late_hooks_log_into_the_same_epoch(tmp_path, monkeypatch):
    """TorchRL calls the hooks of ``post_steps_log`` last: the row must not have been written by then."""
    seen = []

    def register(run):
        if run.loop.epoch == 1:
            run.trainer.register_op("post_steps_log", lambda batch: {"hook/late": seen.append(1) or float(len(seen))})

    run_with(monkeypatch, config(), tmp_path, after_epoch=register)
    assert [row["hook/late"] for row in rows_of(tmp_path)] == ["", "1.0", "2.0", "3.0"]


def test_logged_values_do_not_pile_up(tmp_path, monkeypatch):
    """TorchRL's own trainer appends every logged value to a list for the whole run."""
    logged = []

    def log(batch):
        value = torch.rand(())
        logged.append(weakref.ref(value))
        return {"hook/value": value}

    def register(run):
        if run.loop.epoch == 1:
            run.trainer.register_op("pre_steps_log", log)

    run_with(monkeypatch, config({"training.epochs": 5}), tmp_path, after_epoch=register)
    gc.collect()
    assert len(logged) == 4
    assert not any(reference() is not None for reference in logged)
    assert [bool(row["hook/value"]) for row in rows_of(tmp_path)] == [False, True, True, True, True]


def test_counters(tmp_path, monkeypatch):
    counts = []
    run_with(
        monkeypatch,
        config({"algorithm.collect_steps": 3}),
        tmp_path,
        after_epoch=lambda run: counts.append((run.loop.epoch, run.trainer.agent_steps, run.trainer.env_steps)),
    )
    assert counts == [(1, 6, 6), (2, 12, 12), (3, 18, 18), (4, 24, 24)]
