"""The loop: epochs, steps and the numbers of an epoch; stopping and resuming: test_resume.py."""

from __future__ import annotations

import math

import pytest
from training_cases import CARTPOLE, PENDULUM, assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.algorithm.pwm_paper import PaperPWM
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.loop import COLLECT, FINISH, UPDATE, Loop, not_finite


class TestCounters:
    @pytest.mark.parametrize(("env", "repeat"), [(PENDULUM, 1), (CARTPOLE, 2)], ids=["pendulum", "cartpole"])
    def test_epochs_and_steps(self, env, repeat, tmp_path, monkeypatch):
        counts = []
        run_with(
            monkeypatch,
            config({"algorithm.collect_steps": 3}, env),
            tmp_path,
            after_epoch=lambda run: counts.append((run.loop.epoch, run.loop.agent_steps, run.loop.env_steps)),
        )
        assert counts == [(epoch, 6 * epoch, 6 * epoch * repeat) for epoch in (1, 2, 3, 4)]

    def test_the_learning_rates_fall_from_the_first_epoch_to_the_last(self, tmp_path, monkeypatch):
        seen = []
        epoch = PaperPWM.epoch

        def noted(self, batch, progress):
            seen.append(progress)
            return epoch(self, batch, progress)

        monkeypatch.setattr(PaperPWM, "epoch", noted)
        run_with(monkeypatch, config({"training.epochs": 5}), tmp_path)
        assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]

    def test_a_run_of_one_epoch_begins_with_the_first_learning_rate(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config({"training.epochs": 1}), tmp_path)
        assert float(rows_of(tmp_path)[0]["lr/critic"]) == pytest.approx(5e-4)


class TestPhases:
    def test_one_after_the_other(self, tmp_path, monkeypatch):
        seen = []
        for name in ("collect", "update", "finish"):
            method = getattr(Loop, name)

            def noted(self, name=name, method=method):
                seen.append((name, self.phase, self.epoch))
                method(self)

            monkeypatch.setattr(Loop, name, noted)
        _, run = run_with(monkeypatch, config({"training.epochs": 2}), tmp_path)
        assert seen == [
            ("collect", COLLECT, 0), ("update", UPDATE, 0), ("finish", FINISH, 1),
            ("collect", COLLECT, 1), ("update", UPDATE, 1), ("finish", FINISH, 2),
        ]  # fmt: skip
        assert run.loop.over
        assert run.loop.batch is None

    def test_what_was_collected_is_trained_on_before_anything_new(self, tmp_path, monkeypatch):
        """A run that is stopped between collection and updates does not collect again."""
        cfg = config()

        def stop(run):
            if run.loop.epoch == 2:
                run.stop.ask("test")

        summary, stopped = run_with(monkeypatch, cfg, tmp_path, during_epoch=stop)
        assert (summary["epochs_done"], stopped.loop.agent_steps, len(stopped.source.samples)) == (2, 24, 24)
        collected = []
        run_with(
            monkeypatch,
            cfg,
            tmp_path,
            resume=True,
            during_epoch=lambda run: collected.append((run.loop.epoch, len(run.source.samples))),
        )
        assert collected == [(2, 24), (3, 32)]

    def test_a_stop_that_is_asked_for_when_nothing_is_saved_any_more(self, tmp_path, monkeypatch):
        """Between the end of an epoch without a checkpoint and the next one: the next one saves."""
        cfg = config({"training.checkpoint_every": 0, "training.eval_every": 4})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
        save_if_due = Loop.save_if_due

        def interrupted(self, stopping):
            save_if_due(self, stopping)
            if self.epoch == 2:
                self.stop.ask("test")

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "save_if_due", interrupted)
            summary, stopped = run_with(patch, cfg, tmp_path / "parts")
        assert (summary["status"], summary["epochs_done"]) == ("stopped", 2)
        assert stopped.loop.record.store.latest().name == "checkpoint-000002-inside"
        _, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert_equal(weights_of(parts), weights_of(whole))


class TestRow:
    def test_numbers_of_one_epoch_do_not_enter_the_next(self, tmp_path, monkeypatch):
        def add(run):
            if run.loop.epoch == 1:
                run.loop.row.set({"own/number": 7.0})

        run_with(monkeypatch, config(), tmp_path, during_epoch=add)
        assert [row["own/number"] for row in rows_of(tmp_path)] == ["", "7.0", "", ""]

    def test_an_evaluation_that_was_stopped_is_measured_again_from_its_beginning(self, tmp_path, monkeypatch):
        """And leaves nothing of the first attempt in the row or in the summary."""
        cfg = config({"training.eval_every": 2})
        run_with(monkeypatch, cfg, tmp_path / "whole")
        measure = PolicyEvaluation.measure

        def interrupted(self, epoch, row):
            row.set({"eval/half": 1.0})
            self.between.__self__.ask("test")  # the run's request
            return measure(self, epoch, row)

        with monkeypatch.context() as patch:
            patch.setattr(PolicyEvaluation, "measure", interrupted)
            summary, _ = run_with(patch, cfg, tmp_path / "parts")
        assert (summary["status"], summary["epochs_done"], summary["final_return"]) == ("stopped", 1, None)
        run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["loss/model", "grad_norm/critic"])
    def test_the_first_loss_or_norm_that_is_not_finite(self, name, value):
        assert not_finite({"eval/return_mean": math.nan, "loss/actor": 1.0, name: value}) == name
        assert not_finite({"eval/return_mean": math.nan, "loss/actor": 1.0}) is None


class TestEvaluationIsDue:
    @pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5])])
    def test_every_so_many_epochs_and_at_the_end(self, every, expected, tmp_path, monkeypatch):
        run_with(monkeypatch, config({"training.eval_every": every, "training.epochs": 5}), tmp_path)
        assert [int(row["epoch"]) for row in rows_of(tmp_path) if row["eval/return_mean"]] == expected

    def test_not_at_a_stop(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config({"training.eval_every": 4}), tmp_path, after_epoch=stop_after(3))
        assert "eval/return_mean" not in rows_of(tmp_path)[-1]
