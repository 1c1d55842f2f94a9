from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from episode_cases import NAMES, make_store, random_rows

from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss

LENGTHS, TASKS = [4, 6, 5, 9], [2, 0, 1, 0]


@pytest.fixture
def rows():
    return random_rows(LENGTHS, TASKS, terminated=[False, True, False, False])


@pytest.fixture
def store(tmp_path, rows):
    return make_store(tmp_path / "store", rows)


def test_attributes(store, tmp_path, rows):
    assert store.path == tmp_path / "store"
    assert store.task_names == NAMES
    assert (store.observation_dim, store.action_dim) == (8, 2)
    assert (store.observation_dims, store.action_dims) == ((3, 5, 8), (1, 1, 2))
    assert (store.num_episodes, store.num_transitions) == (4, 24)
    assert store.first_row.tolist() == [0, 5, 12, 18]
    assert store.length.tolist() == LENGTHS
    assert store.task.tolist() == TASKS
    assert store.first_row.dtype == store.length.dtype == store.task.dtype == np.int64
    assert store.manifest["tasks"][0]["episodes"] == 2
    assert store.manifest["tasks"][0]["lengths"] == [6, 9]
    expected = [rows.reward[first : first + n + 1].sum(dtype=np.float64) for first, n in zip(rows.first, LENGTHS)]
    np.testing.assert_allclose(store.returns(), expected)
    np.testing.assert_allclose(store.returns(np.array([3, 1])), [expected[3], expected[1]])


def test_every_slice_is_from_its_episode(store, rows):
    """Compare each value with the written arrays, for every valid start of every horizon."""
    for horizon in (1, 3, 4):
        starts = [(e, s) for e, n in enumerate(LENGTHS) for s in range(n - horizon + 1)]
        first = np.array([rows.first[e] + s for e, s in starts])
        found = store.slices(torch.from_numpy(first), horizon)
        assert found.batch_size == (len(starts), horizon)
        for index, (e, s) in enumerate(starts):
            row = rows.first[e] + s
            now, after = slice(row, row + horizon), slice(row + 1, row + horizon + 1)
            one = found[index]
            np.testing.assert_array_equal(one["observation"], rows.observation[now])
            np.testing.assert_array_equal(one["next", "observation"], rows.observation[after])
            np.testing.assert_array_equal(one["action"], rows.action[after])
            np.testing.assert_array_equal(one["next", "reward"].squeeze(-1), rows.reward[after])
            assert one["task"].tolist() == [TASKS[e]] * horizon
            done = [s + step + 1 == LENGTHS[e] for step in range(horizon)]
            assert one["next", "done"].squeeze(-1).tolist() == done
            assert one["next", "terminated"].squeeze(-1).tolist() == [d and e == 1 for d in done]
    np.testing.assert_array_equal(store.observations(first), rows.observation[first])


def test_no_slice_crosses_an_end(store):
    store.slices(np.array([0]), 4)
    with pytest.raises(IndexError, match="horizon="):
        store.slices(np.array([0]), 5)
    with pytest.raises(IndexError, match="horizon="):
        store.slices(np.array([18, 4]), 1)  # row 4 is the last observation of its episode
    with pytest.raises(IndexError, match=r"\[0, 28\)"):
        store.slices(np.array([-1]), 1)
    with pytest.raises(IndexError, match=r"\[0, 28\)"):
        store.observations(np.array([28]))


def test_prefetching_changes_nothing(store):
    rows = np.array([18, 0, 23, 12])
    expected = store.slices(rows, 4)
    store.prefetch(rows, 4)
    store.prefetch(np.array([27]), 40)  # a range beyond the end is ignored
    assert (store.slices(rows, 4) == expected).all()
    with pytest.raises(IndexError):
        store.prefetch(np.array([28]), 4)


def test_slices_feed_the_loss_of_a_multi_task_model(store):
    spec = WorldModelSpec(8, 2, 16, [32], [32], num_tasks=3, action_dims=(1, 1, 2), task_dim=8)
    losses = PWMModelLoss(make_world_model(spec), form="tdmpc2")(store.slices(np.array([0, 5, 12]), 4))
    assert all(torch.isfinite(value).all() for value in losses.values())


def test_a_worker_opens_the_files_itself(store):
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).observations([3]), store.observations([3]))


def test_without_terminations_there_is_no_file_of_them(tmp_path):
    store = make_store(tmp_path / "store", random_rows([5], [0]))
    assert not (store.path / "terminated.u8").exists()
    found = store.slices(np.array([0]), 5)["next", "terminated"]
    assert found.shape == (1, 5, 1)
    assert found.dtype == torch.bool
    assert not found.any()


def damaged(store, name, change):
    manifest = json.loads((store.path / "manifest.json").read_text())
    if isinstance(change, dict):
        (store.path / name).write_text(json.dumps({**manifest, **change}))
    elif change is None:
        (store.path / name).unlink()
    else:
        content = (store.path / name).read_bytes()
        (store.path / name).write_bytes(content[:change])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", {"format": "else"}, "'pwm_torchrl.episodes'"),
        ("manifest.json", {"version": 2}, "version 2.* 1:"),
        ("manifest.json", {"state": "importing"}, "is not finished .*4 episodes so far"),
        ("manifest.json", None, "no manifest.json"),
        ("manifest.json", 20, "is not JSON"),
        ("action.f32", -1, "action.f32 has 223 bytes.*224"),
        ("reward.f32", None, "reward.f32"),
        ("terminated.u8", 3, "terminated.u8 has 3 bytes"),
        ("episodes.npy", 150, "episodes.npy"),
        ("returns.npy", None, "returns.npy"),
    ],
)
def test_damaged_stores(store, name, change, message):
    damaged(store, name, change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        EpisodeStore.open(store.path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="nothing"):
        EpisodeStore.open(tmp_path / "nothing")
