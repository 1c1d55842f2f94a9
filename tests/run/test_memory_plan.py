"""A run's memory plan: applied, saved, kept by a resumed run, compared with what was measured."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import CLOCKWORK, assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.algorithm.cost import COMPILE_FROM
from pwm_torchrl.config import AlgorithmConfig, Config, DynamicsConfig
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault
from pwm_torchrl.memory import watch as run_memory
from pwm_torchrl.memory.plan import budgets, make_plan
from pwm_torchrl.memory.predict import HOST
from pwm_torchrl.memory.watch import MemoryGuard
from pwm_torchrl.run import memory_plan
from pwm_torchrl.run.memory_plan import RunPlan, decided_compile, saved_choices
from pwm_torchrl.training import train

AUTO = {"memory.kind": "auto", "training.replay_storage": "auto"}
#: One model update needs 50 MiB at once.
LARGE = {**AUTO, "algorithm.model_batch": 2048, "training.epochs": 2, "training.eval_every": 0}


def saved(run_dir):
    return json.loads((run_dir / "memory_plan.json").read_text())


def test_nothing_to_split_is_the_same_run(monkeypatch, tmp_path):
    # The kernel's peak of this process is that of all tests before, unless it is made to begin again.
    Path("/proc/self/clear_refs").write_text("5")
    held = []

    def grow(*_):
        """Whatever the tests before left free in this process, this is more."""
        if not held:
            held.append(bytearray(256 << 20))
            held[0][::4096] = bytes(len(held[0][::4096]))  # touched, so that it is resident

    _, auto = run_with(monkeypatch, config(AUTO), tmp_path / "auto", after_epoch=grow)
    _, fixed = run_with(monkeypatch, config(), tmp_path / "fixed")
    assert_equal(weights_of(auto), weights_of(fixed))
    plan = saved(tmp_path / "auto")
    assert plan["automatic"]
    assert plan["choices"]["replay_storage"] == "memory"
    assert plan["measured"]["host"] >= 200 << 20
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
        train(config({**AUTO, "memory.host_gib": 0.01}), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_fixed_warns_and_goes_on(monkeypatch, tmp_path):
    # The guard, which would stop such a run, has tests of its own.
    cfg = config({"memory.host_gib": 0.01, "training.epochs": 1, "memory.stop_at": 1.0})
    with pytest.warns(UserWarning, match="memory=fixed will not fit: host memory"):
        run_with(monkeypatch, cfg, tmp_path)


def test_planning_changes_no_random_numbers(tmp_path):
    """Seeds are set before a run is planned."""
    cfg = config({**AUTO, "algorithm.horizon": 2})
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    RunPlan(cfg, environment_facts(cfg.env), torch.device("cpu"), tmp_path, resume=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_a_budget_that_needs_parts_trains_in_parts(monkeypatch, tmp_path):
    """And learns the same, up to rounding."""
    # What earlier tests left in this process is no part of the run: its guard, tested elsewhere, keeps out of it.
    monkeypatch.setattr(run_memory, "MemoryGuard", lambda stop_at, limit: MemoryGuard(stop_at))
    cfg = config(LARGE)
    whole = make_plan(cfg, environment_facts(cfg.env), budgets(cfg, None))
    (update,) = (item.bytes for item in whole.prediction.items if item.what == "model update")
    usable = whole.prediction.total(HOST) - update // 2
    _, split = run_with(
        monkeypatch, config({**LARGE, "memory.host_gib": usable / whole.share(HOST) / 2**30}), tmp_path / "split"
    )
    assert split.cfg.memory.model_micro_batch in (256, 512, 1024)
    used = split.algorithm.updates.used
    assert used["model"] == split.cfg.memory.model_micro_batch
    assert saved(tmp_path / "split")["larger"]["change"].startswith("the model update")
    _, at_once = run_with(monkeypatch, config(LARGE), tmp_path / "whole")
    assert at_once.cfg.memory.model_micro_batch is None
    rows, wanted = rows_of(tmp_path / "split"), rows_of(tmp_path / "whole")
    assert len(rows) == len(wanted) == 2
    for row, other in zip(rows, wanted, strict=True):
        for key in (key for key in row if key.startswith(("loss/", "imagination/", "train/"))):
            assert float(row[key] or 0) == pytest.approx(float(other[key] or 0), rel=1e-3, abs=1e-5), key
    assert weights_of(split).keys() == weights_of(at_once).keys()


def test_what_is_written_now_wins_over_the_attempt_before(monkeypatch, tmp_path):
    run_with(monkeypatch, config({**AUTO, "memory.model_micro_batch": 3}), tmp_path, after_epoch=stop_after(2))
    _, run = run_with(monkeypatch, config({**AUTO, "memory.model_micro_batch": 2}), tmp_path, resume=True)
    assert run.cfg.memory.model_micro_batch == saved(tmp_path)["choices"]["model_micro_batch"] == 2


def test_a_new_run_in_the_same_directory_plans_anew(monkeypatch, tmp_path):
    run_with(monkeypatch, config({**AUTO, "memory.model_micro_batch": 3}), tmp_path)
    _, run = run_with(monkeypatch, config(AUTO), tmp_path)
    assert run.cfg.memory.model_micro_batch is None


class TestFiles:
    def plan(self, run_dir, changes=None):
        cfg = config({**AUTO, **(changes or {})})
        return RunPlan(cfg, environment_facts(cfg.env), torch.device("cpu"), run_dir, resume=False)

    def test_are_there_before_anything_is_built(self, tmp_path):
        self.plan(tmp_path)
        assert saved(tmp_path)["measured"] is None
        assert saved(tmp_path)["prediction"]["totals"]["host"] > 0
        assert (tmp_path / "memory_plan.txt").read_text().startswith("host memory, predicted")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["memory_plan.json", "memory_plan.txt"]

    def test_hold_the_measured_peak_however_the_run_ends(self, monkeypatch, tmp_path):
        cfg = config(AUTO, {**CLOCKWORK, "fail_at": 15})
        with pytest.raises(EnvironmentFault):
            run_with(monkeypatch, cfg, tmp_path)
        assert saved(tmp_path)["measured"] is not None
        assert "predicted" in (tmp_path / "memory_plan.txt").read_text().splitlines()[-1]

    def test_measured_is_the_growth_of_this_process(self, monkeypatch, tmp_path):
        made = self.plan(tmp_path)
        before = made.before
        higher = replace(before, peak=before.peak + 2**20)
        monkeypatch.setattr(memory_plan, "read_process", lambda: higher)
        (line,) = made.finish()
        assert saved(tmp_path)["measured"] == {"host": higher.peak - before.rss}
        assert line.startswith("host memory above its base: ")
        assert line.endswith(" predicted")
        assert (tmp_path / "memory_plan.txt").read_text().splitlines()[-1] == line

    def test_a_peak_of_before_is_not_this_runs(self, monkeypatch, tmp_path):
        made = self.plan(tmp_path)
        monkeypatch.setattr(memory_plan, "read_process", lambda: made.before)
        (line,) = made.finish()
        assert saved(tmp_path)["measured"] == {}
        assert line.startswith("host memory above its base: not measured, ")

    def test_a_full_disk_does_not_hide_what_ended_the_run(self, monkeypatch, tmp_path, capsys):
        made = self.plan(tmp_path)

        def full(target, text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(memory_plan, "write_atomically", full)
        with pytest.raises(EnvironmentFault, match="broke"), made.compared():
            raise EnvironmentFault("test", "broke")
        assert "No space left on device" in capsys.readouterr().err
        with pytest.raises(OSError, match="No space left"), made.compared():
            pass

    def test_the_choices_are_read_back(self, tmp_path):
        assert saved_choices(tmp_path) is None
        made = self.plan(tmp_path, {"memory.critic_micro_batch": 5})
        assert saved_choices(tmp_path) == made.plan.choices

    @pytest.mark.parametrize("text", ["", "{}", '{"choices": {"colour": "red"}}'])
    def test_a_file_that_cannot_be_read_is_named_and_planned_anew(self, tmp_path, text, capsys):
        (tmp_path / "memory_plan.json").write_text(text)
        assert saved_choices(tmp_path) is None
        assert str(tmp_path / "memory_plan.json") in capsys.readouterr().err


class TestCompile:
    """What ``algorithm.compile=auto`` decides, and that a resumed run keeps it."""

    @staticmethod
    def decided(cfg: Config, run_dir: Path, resume: bool = False) -> bool:
        return decided_compile(cfg, torch.device("cpu"), run_dir, resume).algorithm.compile

    @staticmethod
    def cfg(epochs: int, compile: object = "auto") -> Config:
        cfg = Config()
        cfg.training.epochs = epochs
        cfg.algorithm.compile = compile
        return cfg

    def test_long_runs_are_compiled_and_short_ones_not(self, tmp_path: Path) -> None:
        assert self.decided(self.cfg(15_000), tmp_path)
        assert not self.decided(self.cfg(10), tmp_path)
        assert not decided_compile(self.cfg(15_000), torch.device("cuda"), tmp_path, False).algorithm.compile

    @pytest.mark.parametrize(
        ("words", "evaluations"),
        [
            ({"kind": "mlp"}, 1 + 1),
            ({"kind": "residual"}, 1 + 1),
            ({"solver": "heun", "substeps": 4}, 7 + 7),
            ({"solver": "euler", "substeps": 8}, 8 + 8),
            ({"parameterization": "tangent", "solver": "heun", "substeps": 4}, 8 + 8),
            ({"solver": "heun", "substeps": 4, "imagination_substeps": 1}, (7 + 1) + 1),
            ({"kind": "pwm_torchrl.modules.MLPDynamics"}, 1 + 1),
        ],
    )
    def test_by_the_evaluations_of_the_dynamics(self, words: dict[str, Any], evaluations: int, tmp_path: Path) -> None:
        """A model update and an actor update of ten steps each in an epoch."""
        epochs = math.ceil(COMPILE_FROM / (10 * evaluations))
        for count, expected in ((epochs, True), (epochs - 1, False)):
            cfg = self.cfg(count)
            cfg.algorithm = AlgorithmConfig(horizon=10, model_updates=1, actor_updates=1)
            cfg.model.dynamics = DynamicsConfig(**words)
            assert self.decided(cfg, tmp_path) is expected

    def test_what_is_written_is_done(self, tmp_path: Path) -> None:
        for value, expected in ((True, True), ("true", True), (False, False), ("false", False)):
            assert self.decided(self.cfg(10, value), tmp_path) is expected

    def test_a_resumed_run_keeps_the_decision(self, tmp_path: Path) -> None:
        assert self.decided(self.cfg(15_000), tmp_path)
        assert self.decided(self.cfg(10), tmp_path, resume=True)
        assert not self.decided(self.cfg(10), tmp_path)

    def test_without_a_compiler_a_sentence_and_eager(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert not self.decided(self.cfg(10, True), tmp_path)
        told = capsys.readouterr().err
        assert "no-such-compiler" in told
        assert "algorithm.compile=false" in told

    @pytest.mark.parametrize("text", ["{}", "", '{"compile": ["x"]}'])
    def test_a_broken_file_is_told(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "compile.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"compile\.json"):
            self.decided(self.cfg(10), tmp_path, resume=True)
