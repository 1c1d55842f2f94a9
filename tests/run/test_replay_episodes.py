"""The replay of a run as stored episodes: whole ones, with what the environment said, from RAM and from disk."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_cases import CLOCKWORK, config, run_with

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.data.episodes import EpisodeStore, import_episodes
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import is_run
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.run.new_episodes import RunReplay

data_main = partial(run_command, "data")

#: As wide as Clockwork: three observations, one action.
TASK = "pendulum-swingup"
STORAGES = pytest.mark.parametrize("storage", ["memory", "disk"])


def trained(monkeypatch: pytest.MonkeyPatch, run_dir: Path, env: dict[str, Any], **changes: Any) -> Path:
    """A run of 16 steps in two environments."""
    after = changes.pop("after_epoch", None)
    settings = {f"training.{key}": value for key, value in changes.items()}
    cfg = config({"training.eval_every": 4, **settings}, {**CLOCKWORK, **env})
    run_with(monkeypatch, cfg, run_dir, after_epoch=after)
    save_config(cfg, run_dir)
    return run_dir


def imported(run_dir: Path, store: Path) -> EpisodeStore:
    return import_episodes([RunReplay(run_dir, TASK)], store, task_set(TASK))


@STORAGES
@pytest.mark.parametrize("ends", ["terminated", "by its length"])
def test_whole_episodes_as_they_were_played(ends, storage, tmp_path, monkeypatch):
    env = {"life": 7} if ends == "terminated" else {"life": 1000, "episode_length": 7}
    run_dir = trained(monkeypatch, tmp_path / "run", env, replay_storage=storage)
    episodes = imported(run_dir, tmp_path / "store")
    assert (episodes.num_episodes, episodes.num_transitions) == (4, 28)  # of 16 steps the last two are a beginning
    starts = set()
    for number in range(4):
        rows = episodes.episode_rows(number)
        start, count, acted = rows.observation.T
        assert (start == start[0]).all()
        np.testing.assert_array_equal(count, np.arange(8))
        np.testing.assert_array_equal(rows.action[1:, 0], acted[1:])
        # The reward is the sum of the action and a float64 of which the observed start is the nearest float32.
        least, most = (np.nextafter(start[1:], np.float32(side)).astype(np.float64) for side in (-np.inf, np.inf))
        assert ((acted[1:] + least).astype(np.float32) <= rows.reward[1:]).all()
        assert (rows.reward[1:] <= (acted[1:] + most).astype(np.float32)).all()
        starts.add(float(start[0]))
    assert len(starts) == 4
    assert episodes.manifest["has_terminated"] == (ends == "terminated")


@STORAGES
def test_an_episode_that_was_overwritten_in_part_is_left_out(storage, tmp_path, monkeypatch):
    run_dir = trained(
        monkeypatch, tmp_path / "run", {"life": 7}, replay_storage=storage, replay_capacity=24
    )  # steps 4 to 16
    episodes = imported(run_dir, tmp_path / "store")
    assert episodes.num_episodes == 2
    np.testing.assert_array_equal(episodes.episode_rows(0).observation[:, 1], np.arange(8))


def test_an_episode_that_a_resumed_run_cut_off_is_left_out(tmp_path, monkeypatch):
    def cut(run) -> None:
        if run.loop.epoch == 1:
            run.source.begin_new_episodes()

    env = {"life": 1000, "episode_length": 7}
    run_dir = trained(monkeypatch, tmp_path / "run", env, after_epoch=cut)
    episodes = imported(run_dir, tmp_path / "store")
    assert episodes.num_episodes == 2
    np.testing.assert_array_equal(episodes.episode_rows(0).observation[:, 1], np.arange(8))


@STORAGES
def test_a_moved_run_has_the_same_digest(storage, tmp_path, monkeypatch):
    runs = [trained(monkeypatch, tmp_path / name, {"life": 7}, replay_storage=storage) for name in "ab"]
    shutil.copytree(runs[0], tmp_path / "c")
    first, other, copy = (RunReplay(run) for run in (*runs, tmp_path / "c"))
    assert first.digest(lambda count: None) == copy.digest(lambda count: None) != other.digest(lambda count: None)
    assert first.size == 16 * 2 * (3 * 4 + 4 + 3 * 4 + 4 + 1 + 1)


class TestCommand:
    def test_imports_runs_beside_one_another(self, tmp_path, monkeypatch, capsys):
        runs = [
            trained(monkeypatch, folder / "seed0", {"life": life})
            for life, folder in ((7, tmp_path / "a"), (5, tmp_path / "b"))
            if folder.mkdir() is None
        ]
        words = ["import", *map(str, runs), str(tmp_path / "store"), "--tasks", TASK, "--task", TASK]
        assert data_main(words) == 0
        assert "10 episodes" in capsys.readouterr().out
        names = [source["name"] for source in EpisodeStore.open(tmp_path / "store").manifest["sources"]]
        assert names == ["a/seed0", "b/seed0"]

    def test_a_folder_of_episodes_beside_another_programs_configuration_is_none(self, tmp_path):
        folder = tmp_path / "episodes"
        folder.mkdir()
        (folder / "config.yaml").write_text("defaults: [base]\nseed: 1\nenv: mine\n")
        arrays = {"observation": np.zeros((4, 3)), "action": np.zeros((3, 1)), "reward": np.zeros(3)}
        np.savez(folder / "one.npz", **arrays)
        assert data_main(["import", str(folder), str(tmp_path / "store"), "--tasks", TASK]) == 0
        assert EpisodeStore.open(tmp_path / "store").num_transitions == 3

    def test_a_task_of_the_registry_is_known(self, tmp_path, monkeypatch):
        pytest.importorskip("dm_control")
        env = {"_target_": "pwm_torchrl.envs.make_task_env", "name": "cup-catch", "task": "cup-catch", "num_envs": 2}
        cfg = config({"training.eval_every": 4}, {**env, "episode_length": 8})
        run_with(monkeypatch, cfg, tmp_path / "run")
        save_config(cfg, tmp_path / "run")
        words = ["import", str(tmp_path / "run"), str(tmp_path / "store"), "--tasks", f"{TASK},cup-catch"]
        assert data_main(words) == 0
        store = EpisodeStore.open(tmp_path / "store")
        assert [(task["name"], task["episodes"]) for task in store.manifest["tasks"]] == [(TASK, 0), ("cup-catch", 4)]


class TestRefused:
    def problem(self, run_dir: Path, tmp_path: Path, tasks: str = TASK, task: str | None = None) -> str:
        with pytest.raises(ConfigurationError) as refused:
            import_episodes([RunReplay(run_dir, task)], tmp_path / "store", task_set(tasks))
        return str(refused.value)

    def test_a_run_that_reads_stored_episodes(self, tmp_path):
        (tmp_path / "run").mkdir()
        save_config(config({"mode": "pretrain"}), tmp_path / "run")
        assert is_run(tmp_path / "run")
        assert "mode is pretrain" in self.problem(tmp_path / "run", tmp_path)

    def test_a_run_without_a_checkpoint(self, tmp_path):
        (tmp_path / "run").mkdir()
        save_config(config(), tmp_path / "run")
        assert "no checkpoint" in self.problem(tmp_path / "run", tmp_path)

    def test_an_unknown_task(self, tmp_path, monkeypatch):
        run_dir = trained(monkeypatch, tmp_path / "run", {"life": 7})
        assert "--task NAME" in self.problem(run_dir, tmp_path, f"{TASK},cup-catch")
        assert "no-task" in self.problem(run_dir, tmp_path, f"{TASK},cup-catch", "no-task")
        assert "observation" in self.problem(run_dir, tmp_path / "other", "cup-catch")

    def test_no_whole_episode(self, tmp_path, monkeypatch):
        run_dir = trained(monkeypatch, tmp_path / "run", {"life": 1000})
        problem = self.problem(run_dir, tmp_path)
        assert "no complete episode" in problem
        assert "16 steps" in problem
        assert "30" in problem

    def test_a_damaged_checkpoint(self, tmp_path, monkeypatch):
        run_dir = trained(monkeypatch, tmp_path / "run", {"life": 7})
        (state,) = CheckpointStore(run_dir).pick("last").glob("components/*-replay/state.safetensors")
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
        assert "damaged" in self.problem(run_dir, tmp_path)
