"""Minari data sets, with a stand-in for the part of its API that is used, and with Minari itself if it is installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
from episode_cases import tasks

from pwm_torchrl.data.episodes import import_episodes
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError


@dataclass
class Box:
    shape: tuple[int, ...]
    dtype: str = "float64"


@dataclass
class Episode:
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray


@dataclass
class Data:
    episodes: list[Episode]
    observation_space: Box = field(default_factory=lambda: Box((3,)))
    action_space: Box = field(default_factory=lambda: Box((1,), "float32"))

    @property
    def total_steps(self):
        return sum(len(episode.rewards) for episode in self.episodes)

    @property
    def total_episodes(self):
        return len(self.episodes)

    def iterate_episodes(self):
        return iter(self.episodes)


def episodes():
    rng = np.random.RandomState(0)
    return [
        Episode(
            rng.randn(n + 1, 3),
            rng.uniform(-1, 1, (n, 1)).astype(np.float32),
            rng.rand(n),
            np.arange(n) == (n - 1 if ends else n),
        )
        for n, ends in ((4, True), (6, False))
    ]


@pytest.fixture
def library(monkeypatch):
    """Data sets by name."""
    library = {"pendulum/random-v0": Data(episodes())}
    module = ModuleType("minari")

    def load_dataset(dataset_id):
        if dataset_id not in library:
            raise FileNotFoundError(dataset_id)
        return library[dataset_id]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "minari", module)
    return library


def check(store):
    assert store.length.tolist() == [4, 6]
    assert [store.task_names[task] for task in store.task] == ["pendulum-swingup"] * 2
    for number, expected in enumerate(episodes()):
        one = store.slices(store.first_row[[number]], len(expected.rewards))[0]
        np.testing.assert_array_equal(one["next", "observation"][:, :3], expected.observations[1:].astype(np.float32))
        np.testing.assert_array_equal(one["action"][:, :1], expected.actions)
        np.testing.assert_array_equal(one["next", "reward"].squeeze(-1), expected.rewards.astype(np.float32))
    ends = store.first_row + store.length - 1
    assert store.slices(ends, 1)["next", "terminated"].flatten().tolist() == [True, False]


def test_episodes_are_imported_unchanged(library, tmp_path):
    store = import_episodes("minari:pendulum/random-v0=pendulum-swingup", tmp_path / "store", tasks())
    check(store)
    assert store.manifest["sources"][0]["name"] == "minari:pendulum/random-v0"
    check(import_episodes("minari:pendulum/random-v0", tmp_path / "one", task_set("pendulum-swingup")))


def test_bad_data_sets(library, tmp_path):
    with pytest.raises(ConfigurationError, match="minari download nothing/here-v0"):
        import_episodes("minari:nothing/here-v0", tmp_path / "store", tasks())
    library["discrete"] = Data(episodes(), action_space=Box((), "int64"))
    library["large"] = Data(episodes())
    library["large"].episodes[1].actions[2] = 7
    given = ["minari:discrete=pendulum-swingup", "minari:large=pendulum-swingup"]
    with pytest.raises(ConfigurationError, match="2 of 2") as caught:
        import_episodes(given, tmp_path / "store", tasks())
    assert "minari:discrete: has actions in Box" in str(caught.value)
    assert "minari:large: episode 1: action of size 7" in str(caught.value)


def test_minari_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'pwm-torchrl\[minari\]'"):
        import_episodes("minari:x", tmp_path / "store", tasks())


@pytest.mark.filterwarnings("ignore::UserWarning:minari.*")
def test_minari_itself(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=number,
            observations=list(each.observations),
            actions=list(each.actions),
            rewards=list(each.rewards),
            terminations=list(each.terminations),
            truncations=[False] * (len(each.rewards) - 1) + [not each.terminations[-1]],
            infos=None,
        )
        for number, each in enumerate(episodes())
    ]
    minari.create_dataset_from_buffers(
        "pendulum/random-v0",
        buffers,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        action_space=gymnasium.spaces.Box(-1, 1, (1,), np.float32),
    )
    check(import_episodes("minari:pendulum/random-v0=pendulum-swingup", tmp_path / "store", tasks()))
