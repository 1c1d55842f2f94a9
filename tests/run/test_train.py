"""train: what a run leaves behind, and that one seed determines it."""

from __future__ import annotations

import json
import math
import resource
import sys

import pytest
import torch
from training_cases import (
    CARTPOLE,
    CLOCKWORK,
    assert_equal,
    config,
    rows_of,
    run_with,
    stop_after,
    weights_of,
)

import pwm_torchrl.run.train as run_module
from pwm_torchrl.devices import pick_device
from pwm_torchrl.envs import make_env
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run import evaluation as evaluation_module
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.run.claims import claimed
from pwm_torchrl.run.collector import evaluation_env_seed
from pwm_torchrl.run.evaluation import play, random_action
from pwm_torchrl.run.summary import Closing, RunSummary
from pwm_torchrl.run.train import Run
from pwm_torchrl.training import train

#: As the project's description lists them.
SUMMARY_KEYS = {
    "model", "size", "env", "seed", "epochs_done", "epochs_planned", "env_steps", "peak_return", "final_return",
    "random_return", "status", "wall_clock_s", "peak_host_bytes", "peak_device_bytes", "restarts",
}  # fmt: skip
EXTRA_KEYS = {
    "agent_steps", "final_return_std", "resume_exact", "peak_own_bytes", "git_commit", "versions", "hardware",
}  # fmt: skip
COLUMNS = {
    "epoch", "agent_steps", "env_steps", "wall_clock_s", "train/return", "eval/return_mean", "eval/return_std",
    "loss/model", "loss/actor", "loss/critic", "grad_norm/model", "grad_norm/actor", "grad_norm/critic",
    "eval/latent_mse", "eval/reward_nmse", "grad_profile/00", "grad_profile/03", "lr/actor", "time/epoch_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ten epochs of 8 steps: the first training episodes end in the eighth."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    PEAKS.append(peak_resident_bytes())
    with pytest.MonkeyPatch.context() as patch:
        made = run_with(patch, config({"training.epochs": 10}), run_dir)
    PEAKS.append(peak_resident_bytes())
    return made


#: Peak resident memory of this process before and after the run of :func:`finished`.
PEAKS: list[int] = []


def peak_resident_bytes() -> int:
    """As the kernel counts it; ``ru_maxrss`` is in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TestWhatIsLeft:
    def test_summary(self, finished):
        summary, run = finished
        assert summary == json.loads((run.run_dir / "summary.json").read_text())
        assert set(summary) == SUMMARY_KEYS | EXTRA_KEYS
        expected = {
            "model": "flow_v1", "size": "test", "env": "pendulum", "seed": 0, "status": "finished", "restarts": 0,
            "epochs_done": 10, "epochs_planned": 10, "agent_steps": 80, "env_steps": 80, "peak_device_bytes": 0,
        }  # fmt: skip
        assert {key: summary[key] for key in expected} == expected
        assert summary["resume_exact"]
        lowest, highest = PEAKS
        assert 0.99 * lowest <= summary["peak_host_bytes"] <= 1.01 * highest
        assert 0 <= summary["peak_own_bytes"] <= 1.01 * highest
        assert summary["peak_own_bytes"] > 0 or sys.platform != "linux"
        assert summary["wall_clock_s"] > 0

    def test_returns_in_the_summary_are_those_of_the_evaluations(self, finished):
        summary, run = finished
        means = [float(row["eval/return_mean"]) for row in rows_of(run.run_dir) if row["eval/return_mean"]]
        assert summary["final_return"] == means[-1]
        assert summary["peak_return"] == max(means)
        env = make_env(run.cfg.env, num_envs=3, seed=5000)
        random = play(env, random_action(env), evaluation_env_seed(0)).returns.mean()
        assert summary["random_return"] == pytest.approx(random.item())

    def test_metrics(self, finished):
        rows = rows_of(finished[1].run_dir, without=())
        assert set(rows[0]) >= COLUMNS
        assert [int(row["epoch"]) for row in rows] == list(range(1, 11))
        assert [int(row["env_steps"]) for row in rows] == list(range(8, 81, 8))
        for every, name in ((2, "eval/return_mean"), (2, "grad_profile/00"), (1, "loss/model")):
            assert [bool(row[name]) for row in rows] == [e % every == 0 for e in range(1, 11)], name
        assert [bool(row["train/return"]) for row in rows] == [e == 8 for e in range(1, 11)]
        assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
        times = [float(row["wall_clock_s"]) for row in rows]
        assert times == sorted(times)

    def test_files(self, finished):
        run_dir = finished[1].run_dir
        assert {"README.md", "metrics.csv", "summary.json", "curves.png", "checkpoints"} <= {
            path.name for path in run_dir.iterdir()
        }
        assert (run_dir / "curves.png").stat().st_size > 10_000
        assert "pendulum, flow_v1, test, seed 0" in (run_dir / "README.md").read_text()
        assert not list(run_dir.glob("*tmp*"))

    def test_checkpoints_are_the_newest_and_the_best(self, finished):
        run = finished[1]
        steps = [saved.epoch for saved in run.loop.record.store.resume_candidates()]
        assert steps[-2:] == [8, 10]
        means = {int(r["epoch"]): float(r["eval/return_mean"]) for r in rows_of(run.run_dir) if r["eval/return_mean"]}
        best = max(means, key=means.get)
        assert int(run.loop.record.store.best().name.rpartition("-")[2]) == best
        assert set(steps) == {8, 10, best}


class TestEvents:
    def test_every_attempt_and_its_end(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config(), tmp_path, after_epoch=stop_after(2))
        run_with(monkeypatch, config(), tmp_path, resume=True)
        with pytest.raises(ConfigurationError):
            train(config({"algorithm.horizon": 31}), tmp_path, resume=True)
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        found = [(event["event"], event["epoch"]) for event in events]
        assert found == [("start", 0), ("stopped", 2), ("resume", 2), ("finished", 4), ("refused", 4)]
        assert "algorithm.horizon=31" in events[-1]["error"]


def test_a_machine_that_cannot_draw_finishes_all_the_same(tmp_path, monkeypatch, capsys):
    def absent(*args):
        raise MissingLibraryError("curves.png needs matplotlib")

    monkeypatch.setattr(run_module, "write_curves", absent)
    monkeypatch.setattr(evaluation_module, "write_video", absent)
    assert train(config({"training.epochs": 1, "training.video": True}), tmp_path)["status"] == "finished"
    shown = "".join(capsys.readouterr())
    assert "no curves: curves.png needs matplotlib" in shown
    assert "no video: " in shown


class TestCounting:
    def test_environment_steps_under_action_repeat(self, tmp_path):
        summary = train(config({"training.checkpoint_every": 0}, CARTPOLE), tmp_path)
        assert (summary["agent_steps"], summary["env_steps"]) == (32, 64)
        last = rows_of(tmp_path)[-1]
        assert (int(last["agent_steps"]), int(last["env_steps"])) == (32, 64)
        # Two of the environments' episodes of ten agent steps end in the third epoch.
        assert [row["train/episodes"] for row in rows_of(tmp_path)] == ["", "", "2", ""]

    def test_collect_steps(self, tmp_path):
        summary = train(config({"algorithm.collect_steps": 1, "training.epochs": 6}), tmp_path)
        assert summary["agent_steps"] == 12
        # No slice of four steps before the fourth epoch.
        assert [bool(row["loss/model"]) for row in rows_of(tmp_path)] == [False] * 3 + [True] * 3

    def test_random_steps(self, tmp_path):
        train(config({"algorithm.random_steps": 16}), tmp_path)
        assert [bool(row["loss/model"]) for row in rows_of(tmp_path)] == [False, True, True, True]


class TestSeeding:
    def test_one_seed_determines_the_run(self, tmp_path, monkeypatch):
        runs = [run_with(monkeypatch, config(), tmp_path / name)[1] for name in "ab"]
        assert rows_of(runs[0].run_dir) == rows_of(runs[1].run_dir)
        assert_equal(weights_of(runs[0]), weights_of(runs[1]))

    def test_what_came_before_does_not_matter(self, tmp_path):
        train(config(), tmp_path)
        expected = rows_of(tmp_path)
        torch.manual_seed(99)
        torch.rand(7)
        train(config(), tmp_path)
        assert rows_of(tmp_path) == expected

    def test_another_seed_differs(self, tmp_path):
        train(config(), tmp_path)
        first = rows_of(tmp_path)
        train(config({"seed": 1}), tmp_path)
        second = rows_of(tmp_path)
        for name in ("loss/model", "eval/return_mean"):
            assert first[-1][name] != second[-1][name]

    def test_evaluating_and_observing_do_not_change_what_is_learned(self, tmp_path, monkeypatch):
        weights = []
        quiet = {"training.eval_every": 0, "training.gradient_profile_every": 0, "training.checkpoint_every": 0}
        for changes in ({"algorithm.actor_starts": "current"}, {"algorithm.actor_starts": "current", **quiet}):
            run = run_with(monkeypatch, config(changes), tmp_path / str(len(weights)))[1]
            weights.append(weights_of(run))
        assert_equal(*weights)

    def test_replay_on_disk_is_the_same_run(self, tmp_path):
        train(config(), tmp_path)
        expected = rows_of(tmp_path)
        train(config({"training.replay_storage": "disk"}), tmp_path)
        assert rows_of(tmp_path) == expected
        assert list((tmp_path / "replay").glob("segment_*.bin"))


class TestOptions:
    @pytest.mark.parametrize(
        "changes",
        [
            {"model.dynamics.kind": "mlp"},
            {"model.dynamics.kind": "residual", "model.reward_head": "two_hot"},
            {"model.loss.flow_matching_weight": 1.0, "memory.model_micro_batch": 3},
            {"algorithm.actor_starts": "current", "algorithm.detach": False, "algorithm.normalize_returns": False},
            {"model.termination_head": True, "model.dynamics.checkpoint_substeps": True},
            {"training.eval_every": 0, "training.checkpoint_every": 0, "training.gradient_profile_every": 0},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_runs_to_the_end(self, changes, tmp_path):
        summary = train(config({"training.epochs": 2, **changes}), tmp_path)
        assert summary["status"] == "finished"
        assert math.isfinite(summary["final_return"])
        assert math.isfinite(float(rows_of(tmp_path)[-1]["loss/model"]))

    def test_terminating_environment(self, tmp_path, monkeypatch):
        summary, run = run_with(monkeypatch, config({"training.epochs": 6}, CLOCKWORK), tmp_path)
        assert summary["status"] == "finished"
        assert run.networks.model.termination is not None
        last = rows_of(tmp_path)[-1]
        assert float(last["loss/model_termination"]) > 0
        assert float(last["data/valid_fraction"]) < 1

    def test_normalized_observations(self, tmp_path, monkeypatch):
        changes = {"algorithm.normalize_observations": True}
        _, run = run_with(monkeypatch, config(changes), tmp_path)
        statistics = run.networks.model.observation_statistics
        observed = run.source.samples.buffer.storage.get(slice(0, 16))["observation"].flatten(0, 1)
        torch.testing.assert_close(statistics.mean, observed.mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(statistics.var, observed.var(0, unbiased=False), atol=1e-3, rtol=1e-3)
        # They stand in front of the encoder, and come back with the checkpoint.
        latent = run.networks.model.encode(observed)
        statistics.mean.add_(1.0)
        assert not torch.allclose(run.networks.model.encode(observed), latent)
        again = fresh_run(run.cfg, tmp_path)
        assert again.restore()
        assert torch.equal(again.networks.model.encode(observed), latent)

    def test_normalized_rewards(self, tmp_path, monkeypatch):
        changes = {"algorithm.normalize_rewards": True}
        summary, run = run_with(monkeypatch, config(changes), tmp_path)
        assert run.source.reward_scale(torch.zeros(2)).tolist() == [0.0, 0.0]
        assert run.source.reward_scale(torch.tensor(1.0)) > 0
        # What is reported stays in the environment's own reward, as does what is stored.
        seed = evaluation_env_seed(run.cfg.seed, 4, 3)
        env = make_env(run.cfg.env, num_envs=3, seed=seed)
        assert summary["final_return"] == pytest.approx(play(env, run.evaluation.act, seed).returns.mean().item())
        assert run.source.samples.buffer.storage.get(slice(0, 16))["next", "reward"].min() < -0.1
        again = fresh_run(run.cfg, tmp_path)
        assert again.restore()
        assert_equal(again.source.reward_scale.state_dict(), run.source.reward_scale.state_dict())
        assert again.source.reward_scale.statistics.count > 30

    def test_running_return_statistics_are_in_the_checkpoint(self, finished):
        run = finished[1]
        again = fresh_run(run.cfg, run.run_dir)
        assert again.restore()
        found = again.components["return_statistics"].state_dict()
        assert_equal(found, run.components["return_statistics"].state_dict())
        assert found["count"] > 70


def fresh_run(cfg, run_dir) -> Run:
    """The parts of a run, nothing restored or trained."""
    with claimed(run_dir, CheckpointStore(run_dir).names()) as claim:
        return Run(cfg, run_dir, RunSummary.start(cfg, run_dir, resume=False), claim, Closing())


class TestSharing:
    """Every part works on the same network objects."""

    def test_every_parameter_is_in_exactly_one_optimizer(self, tmp_path):
        changes = {"model.termination_head": True, "model.reward_head": "two_hot"}
        run = fresh_run(config(changes), tmp_path)
        optimized = [
            id(p)
            for name in ("model", "actor", "critic")
            for group in run.components[f"optimizer_{name}"].param_groups
            for p in group["params"]
        ]
        parameters = [id(p) for _, network in run.networks.items() for p in network.parameters()]
        assert sorted(optimized) == sorted(parameters)
        assert len(set(optimized)) == len(optimized)
        assert id(run.networks.actor.log_std) in optimized

    def test_losses_and_policy(self, tmp_path):
        run = fresh_run(config(), tmp_path)
        networks = {name: {id(p) for p in network.parameters()} for name, network in run.networks.items()}
        evaluated, collecting = run.evaluation.act, run.source.collector.policy
        assert {id(p) for p in evaluated.parameters()} <= networks["model"] | networks["actor"]
        assert networks["actor"] <= {id(p) for p in collecting.parameters()}


class TestRefused:
    """One sentence each, status failed."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"algorithm.horizon": 31},
                r"algorithm.horizon=31 is longer than an episode of pendulum \(30 agent steps\)",
            ),
            ({"algorithm.actor_starts": "past"}, r"algorithm\.actor_starts=past .*replay, current"),
            ({"device": "tpu9"}, r"device=tpu9 .*auto, cpu, cuda or cuda:N"),
            ({"device": "cuda:77"}, r"device='cuda:77' does not exist: PyTorch sees \d+ CUDA devices"),
            ({"training.replay_capacity": 4}, r"training.replay_capacity=4 "),
            ({"training.replay_storage": "tape"}, r"training\.replay_storage=tape .*memory, device, disk"),
            ({"size.latent_dim": 12}, r"size.latent_dim=12 .*size.simnorm_dim"),
            ({"model.dynamics.substeps": 0}, r"model.dynamics.substeps=0"),
            ({"model.loss.form": "sum"}, r"model\.loss\.form=sum .*pwm, tdmpc2"),
            ({"model.reward_head": "three_hot"}, r"model\.reward_head=three_hot .*scalar, two_hot"),
            ({"env.id": "Pendulm-v1"}, r"Pendulm-v1"),
            ({"logger.kind": "paper"}, r"paper"),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
    )
    def test_configuration(self, changes, message, tmp_path):
        with pytest.raises(ConfigurationError, match=message) as caught:
            train(config(changes), tmp_path)
        assert "\n" not in str(caught.value)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert summary["epochs_done"] == 0

    def test_a_horizon_as_long_as_an_episode_is_fine(self, tmp_path):
        changes = {"algorithm.horizon": 5, "env.episode_length": 5, "training.epochs": 1}
        assert train(config(changes), tmp_path)["status"] == "finished"

    def test_devices_that_are_there(self):
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
