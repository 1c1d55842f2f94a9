"""The plan after one that was too small."""

from __future__ import annotations

import json

import pytest

from pwm_torchrl.cluster.deaths import apply_plan, next_plan
from pwm_torchrl.config import Config

CHOICES = {
    "model_micro_batch": None,
    "actor_micro_batch": 64,
    "critic_micro_batch": None,
    "checkpoint_substeps": False,
    "replay_storage": "memory",
}

BATCHES = {"model": 256, "actor": 128, "critic": 512}


def config(host_gib=None, **changes) -> Config:
    cfg = Config()
    cfg.cluster.host_gib = host_gib
    for key, value in changes.items():
        setattr(cfg.memory, key, value)
    return cfg


def saved(run_dir) -> dict:
    return json.loads((run_dir / "memory_plan.json").read_text())


def write(run_dir, compute="host", **changes):
    plan = {"choices": {**CHOICES, **changes}, "batches": BATCHES, "prediction": {"compute": compute}}
    (run_dir / "memory_plan.json").write_text(json.dumps(plan))


class TestMoreMemory:
    def test_comes_first(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(host_gib=64), 8000)
        assert (plan.mem_mb, plan.choices) == (12000, {})
        apply_plan(tmp_path, plan)
        assert saved(tmp_path)["choices"] == CHOICES

    def test_ends_at_the_ceiling(self, tmp_path):
        """64 GiB are 65536 MiB."""
        assert next_plan(tmp_path, config(host_gib=64), 50000).mem_mb == 65536


class TestAtTheCeiling:
    def test_smaller_parts_on_the_host(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.mem_mb == 8000
        assert plan.choices == {
            **CHOICES, "model_micro_batch": 128, "actor_micro_batch": 32, "critic_micro_batch": 256
        }  # fmt: skip
        assert plan.change == "smaller micro-batches: model 128, actor 32, critic 256"
        apply_plan(tmp_path, plan)
        assert saved(tmp_path)["choices"] == plan.choices
        assert saved(tmp_path)["prediction"] == {"compute": "host"}

    def test_what_the_configuration_sets_stays(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(model_micro_batch=200, critic_micro_batch=100), 8000)
        assert plan.choices == {**CHOICES, "actor_micro_batch": 32}

    @pytest.mark.parametrize("compute", ["device", "host"])
    def test_then_the_replay_leaves_memory(self, compute, tmp_path):
        ones = dict.fromkeys(("model_micro_batch", "actor_micro_batch", "critic_micro_batch"), 1)
        write(tmp_path, compute, **(ones if compute == "host" else {}))
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.choices["replay_storage"] == "disk"

    def test_then_nothing_is_left(self, tmp_path):
        write(tmp_path, "device", replay_storage="disk")
        assert next_plan(tmp_path, config(), 8000) is None

    def test_a_fixed_plan_is_respected(self, tmp_path):
        write(tmp_path)
        assert next_plan(tmp_path, config(kind="fixed"), 8000) is None

    def test_without_a_plan_there_is_nothing_to_change(self, tmp_path):
        assert next_plan(tmp_path, config(), 8000) is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda plan: {},
            lambda plan: {key: value for key, value in plan.items() if key != "batches"},
            lambda plan: {**plan, "batches": {"model": "256"}},
            lambda plan: {**plan, "batches": {"policy": 256}},
            lambda plan: {**plan, "choices": {**plan["choices"], "actor_micro_batch": -64}},
            lambda plan: {**plan, "choices": {**plan["choices"], "colour": "red"}},
            lambda plan: {**plan, "choices": {}},
            lambda plan: {**plan, "prediction": {}},
        ],
    )
    def test_with_a_damaged_plan_neither_and_that_is_said(self, damage, tmp_path, capsys):
        write(tmp_path)
        (tmp_path / "memory_plan.json").write_text(json.dumps(damage(saved(tmp_path))))
        assert next_plan(tmp_path, config(), 8000) is None
        assert str(tmp_path / "memory_plan.json") in capsys.readouterr().err

    def test_only_updates_that_the_run_has_are_split(self, tmp_path):
        """One that has a differentiable environment trains no model."""
        write(tmp_path)
        (tmp_path / "memory_plan.json").write_text(json.dumps({**saved(tmp_path), "batches": {"actor": 128}}))
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.choices == {**CHOICES, "actor_micro_batch": 32}
        assert plan.change == "smaller micro-batches: actor 32"
