from __future__ import annotations

import numpy as np
import pytest
import torch
from episode_cases import make_store, random_rows, tasks

from pwm_torchrl.data.episodes import SliceIndex, split_episodes
from pwm_torchrl.errors import ConfigurationError

#: Of the last task no episode is long enough for slices of 4.
LENGTHS, TASKS = [4, 6, 3, 9, 5, 3], [1, 0, 0, 1, 0, 2]
HORIZON = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("index") / "store", random_rows(LENGTHS, TASKS))


def starts(store, chosen):
    return {
        int(store.first_row[e]) + s: int(store.task[e])
        for e in chosen
        for s in range(int(store.length[e]) - HORIZON + 1)
    }


def frequencies(rows):
    found, counts = np.unique(rows, return_counts=True)
    return dict(zip(found.tolist(), (counts / len(rows)).tolist()))


def test_all_valid_starts_are_equally_likely(store):
    index = SliceIndex(store, HORIZON)
    valid = starts(store, range(6))
    assert index.num_starts == len(valid) == 12
    rows = index.sample(24_000)
    assert rows.dtype == np.int64
    found = frequencies(rows)
    assert found.keys() == valid.keys()
    assert max(abs(f - 1 / 12) for f in found.values()) < 0.01
    store.slices(rows[:2000], HORIZON)  # raises where one crosses an end


def test_balanced_draws_each_task_equally_often(store):
    found = frequencies(SliceIndex(store, HORIZON, balanced=True).sample(24_000))
    valid = starts(store, range(6))
    assert found.keys() == valid.keys()
    sizes = [list(valid.values()).count(task) for task in (0, 1)]
    for row, frequency in found.items():
        assert frequency == pytest.approx(0.5 / sizes[valid[row]], abs=0.01)


def test_tasks_and_episodes_restrict(store):
    assert frequencies(SliceIndex(store, HORIZON, tasks=[1]).sample(2000)).keys() == starts(store, [0, 3]).keys()
    some = SliceIndex(store, HORIZON, episodes=np.array([4, 3]), balanced=True)
    assert frequencies(some.sample(2000)).keys() == starts(store, [3, 4]).keys()
    both = SliceIndex(store, HORIZON, tasks=[0], episodes=np.array([1, 3]))
    assert frequencies(both.sample(2000)).keys() == starts(store, [1]).keys()


def test_observations_come_from_every_row(store):
    found = frequencies(SliceIndex(store, HORIZON, tasks=[0]).observation_rows(34_000))
    rows = [int(store.first_row[e]) + s for e in (1, 2, 4) for s in range(LENGTHS[e] + 1)]
    assert sorted(found) == rows  # the short episode's too, and last observations
    assert max(abs(f - 1 / len(rows)) for f in found.values()) < 0.01


@pytest.mark.parametrize("balanced", [False, True])
def test_sampling_uses_the_generator(store, balanced):
    index = SliceIndex(store, HORIZON, balanced=balanced)
    draws = [index.sample(50, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(1)
    assert index.sample(50).tolist() == draws[0]


def test_no_starts(store):
    with pytest.raises(ConfigurationError, match="'cup-catch' has no episode of at least 4 transitions"):
        SliceIndex(store, HORIZON, tasks=[0, 2])
    with pytest.raises(ConfigurationError, match="at least 10"):
        SliceIndex(store, 10)
    with pytest.raises(ConfigurationError, match="task index 3 is not in"):
        SliceIndex(store, HORIZON, tasks=[3])
    with pytest.raises(ConfigurationError, match="horizon=0"):
        SliceIndex(store, 0)
    with pytest.raises(ConfigurationError, match=f"at least {HORIZON}"):
        SliceIndex(store, HORIZON, tasks=[])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    task = [0] * 40 + [1] * 2 + [2]
    return make_store(tmp_path_factory.mktemp("split") / "store", random_rows([2] * len(task), task))


def test_a_split_holds_out_a_fraction_of_every_task(many):
    training, validation = split_episodes(many, 0.1, seed=3)
    assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(43))
    assert np.bincount(many.task[validation], minlength=3).tolist() == [4, 1, 0]
    assert (np.diff(training) > 0).all()
    assert split_episodes(many, 0.99, seed=3)[0].tolist().count(42) == 1  # a lone episode is for training
    assert np.bincount(many.task[split_episodes(many, 0.99, seed=3)[1]], minlength=3).tolist() == [39, 1, 0]


def test_a_split_is_reproducible(many):
    assert split_episodes(many, 0.1, seed=3)[1].tolist() == EXPECTED
    assert split_episodes(many, 0.1, seed=4)[1].tolist() != EXPECTED
    with pytest.raises(ConfigurationError, match=r"fraction \S+ is not"):
        split_episodes(many, 1.0, seed=3)


#: Written down when it was first computed: a change would mix training data into the validation of old runs.
EXPECTED = [16, 22, 26, 37, 41]


def test_the_widest_set_is_drawn_from_by_its_names(many):
    assert many.task_names == tasks().names
