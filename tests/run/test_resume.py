"""Stopping and resuming: the same numbers to the bit, whatever happened to the newest checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_cases import (
    CARTPOLE,
    CLOCKWORK,
    DFLEX,
    PENDULUM,
    assert_equal,
    config,
    rows_of,
    run_with,
    stop_after,
    weights_of,
)

import pwm_torchrl.run.train as run_module
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.train import Run
from pwm_torchrl.training import train


def checkpoints(run_dir):
    """Directories by epoch."""
    return {saved.epoch: saved.path for saved in CheckpointStore(run_dir).resume_candidates()}


def truncate(folder, component="model"):
    file = next(folder.glob(f"components/*-{component}/state.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class TestExactResume:
    @pytest.mark.parametrize(
        ("changes", "env"),
        [
            ({}, PENDULUM),
            # a wrapped replay ring, statistics that run on, shuffled current states, accumulated gradients
            (
                {
                    "training.replay_capacity": 24,
                    "algorithm.normalize_rewards": True,
                    "algorithm.normalize_observations": True,
                    "algorithm.actor_starts": "current",
                    "algorithm.exploration_noise": "pink",
                    "memory.model_micro_batch": 3,
                    "model.loss.flow_matching_weight": 0.5,
                },
                PENDULUM,
            ),
            ({"training.replay_storage": "disk", "training.replay_capacity": 24}, PENDULUM),
            ({"algorithm.random_steps": 32}, PENDULUM),
            ({"model.reward_head": "two_hot"}, CARTPOLE),
        ],
        ids=["plain", "everything", "disk", "random_steps", "dm_control"],
    )
    def test_stopped_and_resumed_equals_straight(self, changes, env, tmp_path, monkeypatch):
        """Eight epochs, in the fourth of which both Pendulum episodes end; stopped after the third and the fifth."""
        cfg = config({"training.epochs": 8, "training.eval_every": 4, "training.checkpoint_every": 2, **changes}, env)
        cfg.env["episode_length"] = 14
        straight, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        first, _ = run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=stop_after(3))
        assert (first["status"], first["epochs_done"]) == ("stopped", 3)
        # Another process: its generators stand elsewhere.
        torch.manual_seed(1234)
        second, _ = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True, after_epoch=stop_after(5))
        assert (second["status"], second["epochs_done"], second["restarts"]) == ("stopped", 5, 1)
        torch.manual_seed(4321)
        last, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "straight")
        volatile = ("wall_clock_s", "peak_host_bytes", "peak_own_bytes", "restarts")
        assert {k: v for k, v in last.items() if k not in volatile} == {
            k: v for k, v in straight.items() if k not in volatile
        }
        assert (last["status"], last["restarts"], last["resume_exact"]) == ("finished", 2, True)

    def test_another_micro_batch_equals_a_run_that_switched_there(self, tmp_path, monkeypatch):
        """A job that comes back with a thriftier plan: from that epoch on it computes as one that has it."""
        cfg = config({"training.epochs": 6})
        smaller = {"model": 3, "actor": 5, "critic": 7}

        def switch(run):
            if run.loop.epoch == 3:
                run.algorithm.updates.sizes.update(smaller)

        _, whole = run_with(monkeypatch, cfg, tmp_path / "switched", during_epoch=switch)
        run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=stop_after(3))
        cfg.memory.model_micro_batch, cfg.memory.actor_micro_batch, cfg.memory.critic_micro_batch = smaller.values()
        last, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert (last["status"], last["resume_exact"]) == ("finished", True)
        assert_equal(weights_of(parts), weights_of(whole))

    def test_a_finished_run_stays_as_it_is(self, tmp_path, monkeypatch):
        first, run = run_with(monkeypatch, config(), tmp_path)
        rows, weights = rows_of(tmp_path), weights_of(run)
        second, run = run_with(monkeypatch, config(), tmp_path, resume=True)
        assert second["status"] == "finished"
        assert (second["epochs_done"], second["final_return"]) == (4, first["final_return"])
        assert rows_of(tmp_path) == rows
        assert_equal(weights_of(run), weights)

    def test_a_longer_run_continues_a_finished_one(self, tmp_path, monkeypatch):
        train(config(), tmp_path)
        summary, _ = run_with(monkeypatch, config({"training.epochs": 6}), tmp_path, resume=True)
        assert (summary["status"], summary["epochs_done"]) == ("finished", 6)
        assert [int(row["epoch"]) for row in rows_of(tmp_path)] == list(range(1, 7))

    def test_resuming_nothing_starts_anew(self, tmp_path):
        expected = train(config(), tmp_path)
        rows = rows_of(tmp_path)
        shutil.rmtree(tmp_path / "checkpoints")
        summary = train(config(), tmp_path, resume=True)
        assert summary["final_return"] == expected["final_return"]
        assert rows_of(tmp_path) == rows

    def test_dflex(self, tmp_path, monkeypatch):
        cfg = config({"training.epochs": 6}, DFLEX)
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=stop_after(2))
        summary, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert summary["status"] == "finished"
        if summary["resume_exact"]:
            assert_equal(weights_of(parts), weights_of(whole))

    def test_an_environment_that_cannot_be_saved(self, tmp_path, monkeypatch):
        """The run says that it is not exact; nothing is learned across the gap."""
        cfg = config({"algorithm.normalize_rewards": True}, CLOCKWORK)
        run_with(monkeypatch, cfg, tmp_path, after_epoch=stop_after(2))
        summary, run = run_with(monkeypatch, cfg, tmp_path, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", False)
        stored = run.source.samples.buffer.storage.get(slice(0, 16))
        # Observation 1 counts the steps of the episode: after 8 steps it starts over.
        assert stored["observation"][:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 6, 0]
        assert stored["next", "done"][:, 0, 0].nonzero().flatten().tolist() == [6, 7, 14]
        # 7 steps to the end of an episode: the return does not contain the step before the gap.
        returns = [float(row["train/return"]) for row in rows_of(tmp_path) if row["train/return"]]
        rewards = stored["next", "reward"].double()
        assert returns == pytest.approx([rewards[a : a + 7].sum(0).mean().item() for a in (0, 8)], rel=1e-6)


#: Calls inside the third epoch of a run that evaluates in every third, and how many of them pass undisturbed.
PLACES = {"collected": 0, "model": 1, "actor": 0, "critic": 2, "evaluation": 5}


class Interrupted:
    """A hook of ``run_with``: from the third epoch on, one call of a kind sends this process a signal."""

    def __init__(self, place: str, signum: signal.Signals = signal.SIGINT, times: int = 1) -> None:
        self.place, self.signum, self.times = place, signum, times
        self.left = PLACES[place]

    def __call__(self, run: Run) -> None:
        if run.loop.epoch != 2:
            return
        if self.place == "collected":
            self.send()
        elif self.place == "evaluation":
            run.evaluation.act = self.after(run.evaluation.act)
        else:
            setattr(run.algorithm.updates, self.place, self.after(getattr(run.algorithm.updates, self.place)))

    def send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), self.signum)

    def after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            result = call(*args)
            self.left -= 1
            if self.left == -1:
                self.send()
            return result

        return counted


CONFIG = config({"training.epochs": 6, "training.eval_every": 3, "algorithm.actor_updates": 2})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of ``CONFIG`` that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_curves", lambda run_dir: None)
        return run_with(patch, CONFIG, tmp_path_factory.mktemp("runs") / "whole")[1]


@pytest.mark.usefixtures("free_signals")
class TestStoppedInside:
    """A signal stops a run at its next step: between two updates, or between two steps of an evaluation."""

    @pytest.mark.parametrize("place", PLACES)
    def test_and_goes_on_there_to_the_bit(self, place, whole, tmp_path, monkeypatch):
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        summary, stopped = run_with(monkeypatch, CONFIG, tmp_path, during_epoch=Interrupted(place))
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (summary["status"], summary["epochs_done"]) == ("stopped", 2)
        assert len(rows_of(tmp_path)) == 2
        assert stopped.loop.record.store.latest().name == "checkpoint-000002-inside"
        assert stopped.loop.phase == ("finish" if place == "evaluation" else "update")
        work = stopped.algorithm.work
        left = None if work is None else (work.model_updates, work.actor_updates, work.passes, len(work.minibatches))
        assert left == {
            "collected": (2, 2, 0, 0), "model": (0, 2, 0, 0), "actor": (0, 1, 2, 0), "critic": (0, 1, 0, 1),
            "evaluation": None,
        }[place]  # fmt: skip
        assert (tmp_path / "curves.png").exists()
        torch.manual_seed(1234)  # as in another process
        last, parts = run_with(monkeypatch, CONFIG, tmp_path, resume=True)
        assert (last["status"], last["restarts"], last["resume_exact"]) == ("finished", 1, True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path) == rows_of(whole.run_dir)

    def test_by_sigterm_too(self, tmp_path, monkeypatch):
        """A second one changes nothing."""
        hook = Interrupted("model", signal.SIGTERM, times=2)
        summary, _ = run_with(monkeypatch, CONFIG, tmp_path, during_epoch=hook)
        assert (summary["status"], summary["epochs_done"]) == ("stopped", 2)
        assert list(checkpoints(tmp_path)) == [2]

    def test_again_and_again(self, whole, tmp_path, monkeypatch):
        for attempt, place in enumerate(("collected", "actor", "critic", "evaluation")):
            hook = Interrupted(place)
            summary, _ = run_with(monkeypatch, CONFIG, tmp_path, resume=attempt > 0, during_epoch=hook)
            assert (summary["status"], summary["epochs_done"]) == ("stopped", 2), place
        _, parts = run_with(monkeypatch, CONFIG, tmp_path, resume=True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path) == rows_of(whole.run_dir)

    def test_before_the_first_epoch(self, whole, tmp_path, monkeypatch):
        """While random actions are evaluated: nothing is learned, so nothing is saved."""
        prelude = PolicyEvaluation.prelude

        def interrupted(evaluation: PolicyEvaluation) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            prelude(evaluation)

        with monkeypatch.context() as patch:
            patch.setattr(PolicyEvaluation, "prelude", interrupted)
            summary, _ = run_with(patch, CONFIG, tmp_path)
        assert (summary["status"], summary["epochs_done"]) == ("stopped", 0)
        assert not checkpoints(tmp_path)
        _, parts = run_with(monkeypatch, CONFIG, tmp_path, resume=True)
        assert_equal(weights_of(parts), weights_of(whole))

    def test_a_second_sigint_interrupts_at_once(self, tmp_path, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            run_with(monkeypatch, CONFIG, tmp_path, during_epoch=Interrupted("collected", times=2))
        assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
        assert list(checkpoints(tmp_path)) == [2]
        assert CheckpointStore(tmp_path).latest().name == "checkpoint-000002"


class TestCheckpoints:
    @pytest.mark.parametrize(("every", "expected"), [(1, [3, 4]), (2, [2, 4]), (3, [3, 4]), (0, [4])])
    def test_every(self, every, expected, tmp_path):
        train(config({"training.checkpoint_every": every, "training.eval_every": 0}), tmp_path)
        assert list(checkpoints(tmp_path)) == expected

    def test_by_minutes(self, tmp_path, monkeypatch):
        """However rare checkpoints are by epochs; minutes are counted from the last one."""
        changes = {"training.checkpoint_every": 0, "training.eval_every": 0, "training.epochs": 6}
        seconds = [0]
        monkeypatch.setattr("pwm_torchrl.run.loop.time", SimpleNamespace(monotonic=lambda: seconds[0]))

        def pass_time(run):
            seconds[0] += 40

        cfg = config({**changes, "training.checkpoint_minutes": 1.5, "training.keep_checkpoints": 9})
        run_with(monkeypatch, cfg, tmp_path, after_epoch=pass_time)
        assert list(checkpoints(tmp_path)) == [3, 6]

    def test_keep(self, tmp_path):
        changes = {"training.checkpoint_every": 1, "training.keep_checkpoints": 3, "training.eval_every": 0}
        train(config(changes), tmp_path)
        assert list(checkpoints(tmp_path)) == [2, 3, 4]

    @pytest.mark.parametrize("storage", ["memory", "disk"])
    def test_rows_after_the_restored_checkpoint_are_dropped(self, storage, tmp_path, monkeypatch):
        """A job killed between two checkpoints repeats the epochs after the first of them."""

        class Killed(BaseException):
            pass

        def kill(run):
            if run.loop.epoch == 3:
                raise Killed

        # Replay is full after the third epoch.
        cfg = config({"training.replay_storage": storage, "training.replay_capacity": 24})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_dir = tmp_path / "killed"
        with pytest.raises(Killed):
            run_with(monkeypatch, cfg, run_dir, after_epoch=kill)
        assert [row["epoch"] for row in rows_of(run_dir)] == ["1", "2", "3"]
        seen = []
        _, parts = run_with(
            monkeypatch, cfg, run_dir, resume=True, during_epoch=lambda run: seen.append(len(rows_of(run_dir)))
        )
        assert seen == [2, 3]
        assert rows_of(run_dir) == rows_of(tmp_path / "straight")
        assert_equal(weights_of(parts), weights_of(whole))

    @pytest.mark.parametrize("storage", ["memory", "disk"])
    @pytest.mark.parametrize("damage", ["tensor", "missing", "manifest", "no manifest", "replay"])
    def test_a_damaged_one_is_passed_over(self, damage, storage, tmp_path, monkeypatch):
        cfg = config({"training.epochs": 6, "training.replay_storage": storage, "training.replay_capacity": 24})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_dir = tmp_path / "parts"
        run_with(monkeypatch, cfg, run_dir, after_epoch=stop_after(4))
        newest = checkpoints(run_dir)[4]
        if damage == "tensor":
            truncate(newest)
        elif damage == "replay":
            truncate(newest, component="replay")
        elif damage == "missing":
            next(newest.glob("components/*-critic/state.safetensors")).unlink()
        elif damage == "manifest":
            (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:200])
        else:
            (newest / "manifest.json").unlink()
        with pytest.warns(UserWarning, match=r"checkpoint-0*4.*Trying the previous checkpoint"):
            summary, run = run_with(monkeypatch, cfg, run_dir, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", True)
        assert_equal(weights_of(run), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "straight")

    def test_no_manifest_is_left(self, tmp_path, monkeypatch):
        """TorchRL sees no checkpoint then; the run must not begin again over what was learned."""
        run_with(monkeypatch, config(), tmp_path, after_epoch=stop_after(2))
        for folder in checkpoints(tmp_path).values():
            (folder / "manifest.json").unlink()
        rows = rows_of(tmp_path)
        with pytest.raises(CheckpointFault, match=r"checkpoint-0*2 is not a readable checkpoint"):
            train(config(), tmp_path, resume=True)
        assert rows_of(tmp_path) == rows

    def test_all_damaged(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config(), tmp_path, after_epoch=stop_after(2))
        for folder in checkpoints(tmp_path).values():
            truncate(folder)
        rows = rows_of(tmp_path)
        message = r"The checkpoint .*checkpoint-0*2 cannot be read, it is truncated or damaged"
        with pytest.raises(CheckpointFault, match=message) as caught:
            train(config(), tmp_path, resume=True)
        assert "\n" not in str(caught.value)
        assert rows_of(tmp_path) == rows
        assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"

    def test_a_failed_resume_keeps_what_the_summary_knew(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config(), tmp_path, after_epoch=stop_after(2))
        before = json.loads((tmp_path / "summary.json").read_text())
        for folder in checkpoints(tmp_path).values():
            truncate(folder)
        with pytest.raises(CheckpointFault):
            train(config(), tmp_path, resume=True)
        after = json.loads((tmp_path / "summary.json").read_text())
        for key in ("epochs_done", "env_steps", "final_return", "peak_return", "random_return"):
            assert after[key] == before[key], key

    @pytest.mark.parametrize(
        "changes",
        [
            {"size.latent_dim": 24},
            {"model.termination_head": True},
            {"model.dynamics.kind": "mlp"},
            {"size.num_critics": 2},
            {"env.num_envs": 3},
            {"algorithm.normalize_rewards": True},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_of_another_configuration(self, changes, tmp_path):
        train(config({"training.epochs": 2}), tmp_path)
        with pytest.raises(ConfigurationError) as caught:
            train(config({"training.epochs": 4, **changes}), tmp_path, resume=True)
        message = str(caught.value)
        assert "\n" not in message
        assert "belongs to another configuration" in message or "env.num_envs" in message
        assert checkpoints(tmp_path)

    def test_of_another_schema_version(self, tmp_path):
        train(config({"training.checkpoint_every": 0, "training.eval_every": 0}), tmp_path)
        manifest = checkpoints(tmp_path)[4] / "manifest.json"
        content = json.loads(manifest.read_text())
        content["metadata"]["schema_version"] = 999
        manifest.write_text(json.dumps(content))
        message = r"has schema version 999; this release of pwm_torchrl reads version 4\."
        with pytest.raises(CheckpointFault, match=message):
            train(config(), tmp_path, resume=True)
