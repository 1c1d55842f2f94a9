"""Predicted sizes compared with those of real storages."""

from __future__ import annotations

import pytest
from replay_cases import random_steps

from pwm_torchrl.data import SegmentStore, TrajectoryReplay
from pwm_torchrl.data.layout import RecordLayout
from pwm_torchrl.data.segment_files import held_bytes
from pwm_torchrl.memory.storage import (
    MOST_SEGMENTS,
    SEGMENTS,
    disk_bytes,
    record_bytes,
    replay_bytes,
    replay_disk_bytes,
    segment_steps,
    steps_since_checkpoint,
)

#: Observations, actions.
DIMS = [(3, 1), (37, 8), (76, 21), (11, 3)]


@pytest.mark.parametrize(("observations", "actions"), DIMS)
def test_a_record(observations, actions):
    layout = RecordLayout.of(random_steps(2, 2, observations, actions))
    assert layout.record_bytes == record_bytes(observations, actions)


@pytest.mark.parametrize("storage", ["memory", "device"])
@pytest.mark.parametrize(("observations", "actions"), DIMS)
@pytest.mark.parametrize("capacity", [300, 301, 302])
def test_in_ram(capacity, observations, actions, storage):
    replay = TrajectoryReplay(capacity, 3, 4, storage)
    replay.extend(random_steps(5, 3, observations, actions))
    stored = replay.buffer.storage._storage
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in stored.values(True, True)}
    assert sum(held.values()) == replay_bytes(observations, actions, capacity, 3)


@pytest.mark.parametrize(("capacity", "since", "batch"), [(60, 7, 7), (60, 30, 5), (160, 1, 1), (33, 200, 10)])
@pytest.mark.parametrize("segment", [None, 1, 7, 50])
def test_on_disk(capacity, since, batch, segment, tmp_path):
    """Maximum size of the folder, with checkpoints at every allowed step."""
    envs, observations, actions = 2, 3, 1
    store = SegmentStore(tmp_path, capacity, envs, 4, segment, since)
    limit = disk_bytes(capacity, envs * record_bytes(observations, actions), since, segment)
    if segment is None:
        assert limit == replay_disk_bytes(observations, actions, capacity * envs, envs, since)
    assert limit >= replay_bytes(observations, actions, capacity * envs, envs, since)
    saved, most = 0, 0
    for _ in range(400 // batch):
        store.extend(random_steps(batch, envs, observations, actions))
        most = max(most, held_bytes(tmp_path))
        if store.steps + batch - saved > since:
            saved = store.steps
            store.release(saved)
    one_file = store._files.size
    assert limit - one_file <= most <= limit


@pytest.mark.parametrize("capacity", [1, 10, 1000, 7812, 1_000_000])
@pytest.mark.parametrize("step_bytes", [14, 43_000, 10_000_000, 10**9])
def test_segments(capacity, step_bytes):
    """Few enough to keep open, and small enough to be deleted early."""
    steps = segment_steps(capacity, step_bytes)
    assert 1 <= steps <= capacity
    assert capacity / steps <= MOST_SEGMENTS
    assert steps <= -(-capacity // SEGMENTS)


@pytest.mark.parametrize(
    ("epochs", "every", "keep", "expected"),
    [
        (1000, 50, 2, 100),
        (1000, 50, 0, 50),
        (1000, 50, 1, 50),
        (60, 50, 2, 60),
        (1000, 0, 2, 1000),  # only the best ones are saved before the end
        (0, 50, 2, 1),
    ],
)
def test_steps_between_checkpoints(epochs, every, keep, expected):
    assert steps_since_checkpoint(epochs, 16, every, keep) == 16 * expected
