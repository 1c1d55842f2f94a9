"""A run's memory plan: applied, saved, kept by a resumed run, compared with what was measured."""

from __future__ import annotations

import json

import pytest
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training import train

AUTO = {"memory.kind": "auto", "training.replay_storage": "auto"}


def saved(run_dir):
    return json.loads((run_dir / "memory_plan.json").read_text())


def test_nothing_to_split_is_the_same_run(monkeypatch, tmp_path):
    _, auto = run_with(monkeypatch, config(AUTO), tmp_path / "auto")
    _, fixed = run_with(monkeypatch, config(), tmp_path / "fixed")
    assert_equal(weights_of(auto), weights_of(fixed))
    plan = saved(tmp_path / "auto")
    assert plan["automatic"]
    assert plan["choices"]["replay_storage"] == "memory"
    assert plan["measured"]["host"] > 0
    text = (tmp_path / "auto" / "memory_plan.txt").read_text()
    assert "host memory above its base:" in text


def test_a_resumed_run_keeps_its_choices(monkeypatch, tmp_path):
    cfg = config({**AUTO, "memory.model_micro_batch": 3})
    run_with(monkeypatch, cfg, tmp_path, after_epoch=stop_after(2))
    assert saved(tmp_path)["choices"]["model_micro_batch"] == 3
    _, run = run_with(monkeypatch, config(AUTO), tmp_path, resume=True)
    assert run.cfg.memory.model_micro_batch == 3
    assert len(rows_of(tmp_path)) == 4


def test_impossible_stops_before_anything_is_built(tmp_path):
    with pytest.raises(ConfigurationError, match="The smallest budget that would work"):
        train(config({**AUTO, "memory.host_gb": 0.01}), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_fixed_warns_and_goes_on(monkeypatch, tmp_path):
    # The guard, which would stop such a run, has tests of its own.
    cfg = config({"memory.host_gb": 0.01, "training.epochs": 1, "memory.stop_at": 1.0})
    with pytest.warns(UserWarning, match="memory=fixed will not fit: host memory"):
        run_with(monkeypatch, cfg, tmp_path)
