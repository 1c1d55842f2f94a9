from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from episode_cases import NAMES, tasks, write_chunks

from pwm_torchrl.data.episodes import import_episodes
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError


def episode(task, length, seed=0, **more):
    rng = np.random.RandomState(seed)
    index = NAMES.index(task)
    return {
        "observation": rng.randn(length + 1, tasks().observation_dims[index]),
        "action": rng.uniform(-1, 1, (length, tasks().action_dims[index])).astype(np.float32),
        "reward": rng.rand(length),
        "task": task,
        **more,
    }


#: A set of one task, of 3 observation and 1 action dimensions.
OBS, ACT = 3, 1
ONE = task_set(["pendulum-swingup"])


def ended(store):
    """Which episodes ended by termination."""
    last = store.slices(store.first_row + store.length - 1, 1)["next"]
    if "terminated" not in last.keys():
        return [False] * store.num_episodes
    return last["terminated"].flatten().tolist()


def check(store, number, given, task):
    length = len(given["reward"])
    one = store.slices(store.first_row[number : number + 1], length)[0]
    observation, action = given["observation"].astype(np.float32), given["action"]
    assert store.length[number] == length
    assert store.task_names[store.task[number]] == task
    o, a = observation.shape[1], action.shape[1]
    np.testing.assert_array_equal(one["observation"][:, :o], observation[:-1])
    np.testing.assert_array_equal(one["next", "observation"][:, :o], observation[1:])
    np.testing.assert_array_equal(one["action"][:, :a], action)
    assert not one["observation"][:, o:].any()
    assert not one["action"][:, a:].any()
    np.testing.assert_array_equal(one["next", "reward"].squeeze(-1), given["reward"].astype(np.float32))


def test_npz_with_one_episode_and_with_several(tmp_path):
    first = episode("cup-catch", 4, terminated=True)
    second, third = episode("pendulum-swingup", 7, 1), episode("cartpole-swingup", 2, 2, terminated=np.array(False))
    np.savez(tmp_path / "a.npz", **first)
    several = {f"{name}/{key}": value for name, e in (("x", second), ("y", third)) for key, value in e.items()}
    np.savez_compressed(tmp_path / "b.npz", **several)
    store = import_episodes(tmp_path, tmp_path / "store", tasks())
    for number, given in enumerate((first, second, third)):
        check(store, number, given, given["task"])
    assert [record["episodes"] for record in store.manifest["sources"]] == [1, 2]
    ends = store.first_row + store.length - 1
    assert store.slices(ends, 1)["next", "terminated"].flatten().tolist() == [True, False, False]


@pytest.mark.parametrize("grouped", [True, False])
def test_hdf5(tmp_path, grouped):
    h5py = pytest.importorskip("h5py")
    given = [episode("pendulum-swingup", 7, 1), episode("cartpole-swingup", 2, 2)][: 2 if grouped else 1]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number, each in enumerate(given):
            group = file.create_group(f"episode_{number}") if grouped else file
            for key, value in each.items():
                group[key] = value
    store = import_episodes(tmp_path, tmp_path / "store", tasks())
    for number, each in enumerate(given):
        check(store, number, each, each["task"])
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match=r"a\.h5: .*HDF5"):
        import_episodes(tmp_path, tmp_path / "other", tasks())


def test_h5py_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").touch()
    with pytest.raises(MissingLibraryError, match=r"pip install 'pwm-torchrl\[hdf5\]'"):
        import_episodes(tmp_path, tmp_path / "store", tasks())


def test_episodes_without_a_task(tmp_path):
    given = episode("cup-catch", 4)
    del given["task"]
    np.savez(tmp_path / "a.npz", **given)
    with pytest.raises(ConfigurationError, match=r"a\.npz: .* 3;.*--task"):
        import_episodes(tmp_path, tmp_path / "store", tasks())
    check(import_episodes(tmp_path, tmp_path / "store", tasks(), task="cup-catch"), 0, given, "cup-catch")
    check(import_episodes(tmp_path, tmp_path / "one", task_set("cup-catch")), 0, given, "cup-catch")
    with pytest.raises(ConfigurationError, match="did you mean cup-catch"):
        import_episodes(tmp_path, tmp_path / "two", tasks(), task="cup-cach")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": np.zeros((4, 8))}, r"observation has shape \[4, 8\].*\[5, 8\].*'cup-catch'"),
        ({"observation": np.zeros((5, 3))}, r"observation has shape \[5, 3\]"),
        ({"action": np.zeros((5, 2))}, r"action has shape \[5, 2\]"),
        ({"action": np.full((4, 2), 1.1)}, "action of size 1.1 at index 1"),
        ({"reward": np.array([0, 1, np.nan, 0])}, "reward is not finite at index 3"),
        ({"reward": np.array([0, 1, 1e300, 0])}, "reward is not finite"),
        ({"reward": np.zeros((0,))}, ".*at least 1 transition"),
        ({"reward": np.array(["a"] * 4)}, "reward is <U1"),
        ({"terminated": np.zeros(4, bool)}, r"terminated has shape \[4\]"),
        ({"task": "walker-walk"}, "task 'walker-walk'"),
        ({"task": np.array(["cup-catch"] * 2)}, r"task has shape \[2\]"),
    ],
)
def test_bad_episodes(tmp_path, change, message):
    np.savez(tmp_path / "a.npz", **{f"x/{k}": v for k, v in {**episode("cup-catch", 4), **change}.items()})
    with pytest.raises(ConfigurationError, match="a.npz: episode 'x': " + message):
        import_episodes(tmp_path, tmp_path / "store", tasks())


def test_files_of_other_kinds(tmp_path):
    np.savez(tmp_path / "a.npz", observation=np.zeros(3))
    (tmp_path / "b.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", **{**episode("cup-catch", 4), "reward": np.array([object()] * 4)})
    with pytest.raises(ConfigurationError, match="4 of 4 sources") as caught:
        import_episodes(tmp_path, tmp_path / "store", tasks())
    message = str(caught.value)
    assert "a.npz: has no action, reward; it has observation" in message  # the missing and the present arrays
    assert "b.npz: " in message
    assert "c.npz: " in message
    assert "d.npz: " in message


def test_several_sources_and_kinds_make_one_store(tmp_path):
    write_chunks(tmp_path / "chunks", 1)
    (tmp_path / "own").mkdir()
    np.savez(tmp_path / "own" / "a.npz", **episode("cup-catch", 4))
    given = [tmp_path / "chunks", tmp_path / "own" / "a.npz"]
    store = import_episodes(given, tmp_path / "store", tasks())
    assert [record["name"] for record in store.manifest["sources"]] == ["chunks/chunk_0.pt", "own/a.npz"]
    with pytest.raises(ConfigurationError, match=r"own/a\.npz"):
        import_episodes([given[1]] * 2, tmp_path / "other", tasks())
    with pytest.raises(ConfigurationError, match="file of episodes"):
        import_episodes(store.path / "reward.f32", tmp_path / "other", tasks())
    assert torch.isfinite(store.observations(np.arange(store.num_rows))).all()


class TestLayoutsOfOthers:
    """D4RL's flat arrays and Minari's groups, in either kind of file."""

    def write(self, file: Path, arrays: dict[str, np.ndarray]) -> None:
        if file.suffix == ".npz":
            np.savez(file, **arrays)
            return
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "w") as opened:
            for name, value in arrays.items():
                opened[name] = value

    def flat(self, lengths: tuple[int, ...], terminal: tuple[bool, ...]) -> dict[str, np.ndarray]:
        """Episodes whose observations count on, so that every row can be told."""
        steps = sum(lengths)
        last = np.cumsum(lengths) - 1
        ends = np.zeros((2, steps), bool)
        ends[0, last] = terminal
        ends[1, last] = [not each for each in terminal]
        begins = np.concatenate([100 * e + np.arange(n) for e, n in enumerate(lengths)]).astype(np.float32)
        return {
            "observations": np.repeat(begins[:, None], OBS, 1),
            "next_observations": np.repeat(begins[:, None] + 1, OBS, 1),
            "actions": np.full((steps, ACT), 0.5, np.float32),
            "rewards": np.arange(steps, dtype=np.float32),
            "terminals": ends[0],
            "timeouts": ends[1],
        }

    @pytest.mark.parametrize("suffix", [".npz", ".h5"])
    @pytest.mark.parametrize("without", [(), ("timeouts",), ("next_observations",)], ids=str)
    def test_d4rl(self, tmp_path, suffix, without):
        arrays = self.flat((3, 4, 2), (True, False, False))
        for name in without:
            del arrays[name]
        arrays["metadata/algorithm"] = np.array(3)
        arrays["infos/qpos"] = np.zeros((9, 5))
        self.write(tmp_path / f"flat{suffix}", arrays)
        store = import_episodes(tmp_path / f"flat{suffix}", tmp_path / "store", ONE)
        whole = "next_observations" not in without
        assert store.length.tolist() == ([3, 4, 2] if whole else [2, 3, 1])
        rows = store.episode_rows(1)
        first = 100 + np.arange(5 if whole else 4)
        assert rows.observation[:, 0].tolist() == first.tolist()
        assert rows.reward.tolist() == ([0, 3, 4, 5, 6] if whole else [0, 3, 4, 5])
        assert ended(store) == [whole, False, False]

    def test_d4rl_without_ends_is_refused(self, tmp_path):
        arrays = self.flat((3, 4), (True, False))
        del arrays["timeouts"], arrays["next_observations"]
        self.write(tmp_path / "flat.npz", arrays)
        with pytest.raises(ConfigurationError, match=r"neither timeouts nor next_observations"):
            import_episodes(tmp_path / "flat.npz", tmp_path / "store", ONE)

    def test_minaris_file(self, tmp_path):
        arrays = {}
        for number, terminated in enumerate((False, True)):
            flags = np.array([False, False, terminated])
            values = {
                "observations": np.full((4, OBS), number, np.float32), "actions": np.zeros((3, ACT), np.float32),
                "rewards": np.ones(3, np.float32), "terminations": flags, "truncations": ~flags,
            }  # fmt: skip
            arrays |= {f"episode_{number}/{key}": value for key, value in values.items()}
        self.write(tmp_path / "main_data.hdf5", arrays)
        store = import_episodes(tmp_path / "main_data.hdf5", tmp_path / "store", ONE)
        assert store.length.tolist() == [3, 3]
        assert ended(store) == [False, True]

    def test_a_group_of_notes_condemns_nothing(self, tmp_path):
        arrays = {
            "first/observation": np.zeros((3, OBS)), "first/action": np.zeros((2, ACT)), "first/reward": np.zeros(2),
            "notes/author": np.array(7),
        }  # fmt: skip
        self.write(tmp_path / "own.h5", arrays)
        assert import_episodes(tmp_path / "own.h5", tmp_path / "store", ONE).num_episodes == 1

    def test_another_layout_is_named(self, tmp_path):
        self.write(tmp_path / "other.h5", {"data/demo_0/obs": np.zeros((3, OBS)), "mask": np.zeros(3)})
        with pytest.raises(ConfigurationError, match=r"other\.h5: has data/demo_0, mask"):
            import_episodes(tmp_path / "other.h5", tmp_path / "store", ONE)
