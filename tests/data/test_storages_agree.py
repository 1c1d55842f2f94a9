"""All storages return bitwise equal samples, before and after the ring is full."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import H, N, numbered, random_steps

from pwm_torchrl.data import SegmentStore, TrajectoryReplay
from pwm_torchrl.data.layout import STORED_KEYS
from pwm_torchrl.data.replay import slot_order
from pwm_torchrl.errors import ConfigurationError


def on_disk(folder: Path, capacity: int, envs: int, horizon: int, segment: int) -> TrajectoryReplay:
    """A replay on disk with a given segment length."""
    replay = TrajectoryReplay(capacity * envs, envs, horizon, "disk", folder)
    replay.store = SegmentStore(folder, capacity, envs, horizon, segment)
    return replay


def assert_same_samples(first: TrajectoryReplay, second: TrajectoryReplay, seed: int, count: int = 40) -> None:
    assert (len(first), first.collected, first.can_sample) == (len(second), second.collected, second.can_sample)
    if not first.can_sample:
        return
    drawn = []
    for replay in (first, second):
        torch.manual_seed(seed)
        slices, observations = replay.sample_slices(count), replay.sample_observations(count)
        drawn.append([slices.get(key) for key in STORED_KEYS] + [observations, torch.rand(1)])
        assert slices.batch_size == (count, first.horizon)
    for ours, theirs in zip(*drawn, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_done_to_them(data):
    """Batches of any length, ended episodes, and returns to earlier checkpoints."""
    horizon, envs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    capacity, segment = data.draw(st.integers(horizon, 12)), data.draw(st.integers(1, 14))
    with tempfile.TemporaryDirectory() as name:
        memory = TrajectoryReplay(capacity * envs, envs, horizon)
        disk = on_disk(Path(name) / "replay", capacity, envs, horizon, segment)
        saved = []
        for seed in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(["extend", "extend", "extend", "end", "save", "load"]))
            if action == "extend":
                batch = random_steps(data.draw(st.integers(1, capacity)), envs)
                memory.extend(batch)
                disk.extend(batch)
            elif action == "end":
                memory.end_episodes()
                disk.end_episodes()
            elif action == "save":
                saved = [*saved[-1:], (memory.state_dict(), disk.state_dict())]
                disk.release(saved[0][1]["steps"])
            elif saved:
                # From here on, the data of the later checkpoint are overwritten.
                del saved[data.draw(st.integers(1, len(saved))) :]
                memory.load_state_dict(saved[-1][0])
                disk = on_disk(Path(name) / "replay", capacity, envs, horizon, segment)
                disk.load_state_dict(saved[-1][1])
                disk.release(saved[0][1]["steps"])
            assert_same_samples(memory, disk, seed)


@pytest.mark.parametrize("segment", [1, 3, 4, 7, 100])
def test_long_after_the_ring_is_full(segment, tmp_path):
    memory, disk = TrajectoryReplay(10 * N, N, H), on_disk(tmp_path, 10, N, H, segment)
    for seed, steps in enumerate([3, 1, 6, 10, 2, 9, 9, 4, 5, 5]):
        batch = numbered(7 * seed, steps)
        memory.extend(batch)
        disk.extend(batch)
        assert_same_samples(memory, disk, seed)


def test_on_the_device():
    memory, device = TrajectoryReplay(10 * N, N, H), TrajectoryReplay(10 * N, N, H, "device")
    for seed in range(5):
        batch = random_steps(4, N)
        memory.extend(batch)
        device.extend(batch)
        assert_same_samples(memory, device, seed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_on_a_gpu(storage, tmp_path):
    """Indices are drawn on the CPU, so samples on the device are equal."""
    cpu = TrajectoryReplay(10 * N, N, H)
    gpu = TrajectoryReplay(10 * N, N, H, storage, tmp_path, "cuda")
    for seed in range(5):
        batch = random_steps(4, N)
        cpu.extend(batch)
        gpu.extend(batch)
        drawn = []
        for replay in (cpu, gpu):
            torch.manual_seed(seed)
            slices = replay.sample_slices(40)
            drawn.append([slices.get(key) for key in STORED_KEYS] + [replay.sample_observations(40)])
            assert {value.device.type for value in drawn[-1]} == {replay.device.type}
        for ours, theirs in zip(*drawn, strict=True):
            assert torch.equal(ours, theirs.cpu())
    assert all(value.device.type == "cpu" for value in gpu.state_dict().get("data", {}).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_numbers(dtype, tmp_path):
    memory, disk = TrajectoryReplay(10 * N, N, H), on_disk(tmp_path, 10, N, H, 4)
    for seed in range(4):
        batch = random_steps(4, N, observation_dim=3, action_dim=2)
        batch["observation"] = batch["observation"].to(dtype)
        memory.extend(batch)
        disk.extend(batch)
        assert_same_samples(memory, disk, seed)
        assert disk.sample_observations(1).dtype == dtype


def test_one_slice(tmp_path):
    """A batch of one is contiguous with any strides."""
    memory, disk = TrajectoryReplay(H, 1, H), on_disk(tmp_path, H, 1, H, 3)
    for replay in (memory, disk):
        replay.extend(numbered(0, H, envs=1))
    assert_same_samples(memory, disk, 0, count=1)


def test_expanded_and_strided_batches(tmp_path):
    """Views are stored by their values."""
    memory, disk = TrajectoryReplay(10 * N, N, H), on_disk(tmp_path, 10, N, H, 4)
    batch = random_steps(8, N)
    batch["next", "done"] = torch.zeros(1, 1, 1, dtype=torch.bool).expand(N, 8, 1)
    batch["action"] = torch.randn(8, N, 1).transpose(0, 1)
    for replay in (memory, disk):
        replay.extend(batch)
    assert_same_samples(memory, disk, 0)


def test_episodes_that_ended_after_the_checkpoint(tmp_path):
    """Overwritten done flags on disk do not change an earlier checkpoint."""
    memory, disk = TrajectoryReplay(10 * N, N, H), on_disk(tmp_path, 10, N, H, 4)
    batch = random_steps(9, N)
    for replay in (memory, disk):
        replay.extend(batch)
        state = replay.state_dict()
        replay.end_episodes()
        replay.load_state_dict(state)
    assert not disk.store._newest_done().all()
    assert_same_samples(memory, disk, 0, count=200)


class TestConversion:
    """A checkpoint of one storage is loaded into another."""

    @pytest.mark.parametrize("written", [[], [3], [10], [4, 9], [10, 10], [7, 7, 7, 2]])
    @pytest.mark.parametrize(("before", "after"), [("memory", "disk"), ("disk", "memory"), ("device", "disk")])
    def test_equals_the_one_that_stayed(self, before, after, written, tmp_path, monkeypatch):
        monkeypatch.setattr("pwm_torchrl.data.replay.PART", 3)
        replay = TrajectoryReplay(10 * N, N, H, before, tmp_path)
        straight = TrajectoryReplay(10 * N, N, H)
        for steps in written:
            batch = random_steps(steps, N)
            replay.extend(batch)
            straight.extend(batch)
        state = replay.state_dict()
        resumed = TrajectoryReplay(10 * N, N, H, after, tmp_path)
        resumed.load_state_dict(state)
        assert_same_samples(straight, resumed, 0)
        for seed in range(1, 5):
            batch = random_steps(4, N)
            straight.extend(batch)
            resumed.extend(batch)
            assert_same_samples(straight, resumed, seed)
        again = TrajectoryReplay(10 * N, N, H, after, tmp_path)
        again.load_state_dict(resumed.state_dict())
        assert_same_samples(straight, again, 5)

    def test_another_shape_is_refused(self, tmp_path):
        replay = TrajectoryReplay(10 * N, N, H)
        replay.extend(random_steps(8, N))
        for capacity, envs in ((10, N + 1), (6, N)):
            other = TrajectoryReplay(capacity * envs, envs, H, "disk", tmp_path)
            with pytest.raises(ConfigurationError, match=rf"8 steps of {N} environments"):
                other.load_state_dict(replay.state_dict())

    def test_without_the_folder(self, tmp_path):
        replay = TrajectoryReplay(10 * N, N, H, "disk", tmp_path)
        replay.extend(random_steps(8, N))
        with pytest.raises(ConfigurationError, match=r"training\.replay_storage=disk"):
            TrajectoryReplay(10 * N, N, H).load_state_dict(replay.state_dict())

    @pytest.mark.parametrize(
        ("steps", "expected"),
        [
            (0, []),
            (7, [(0, 7)]),
            (10, [(0, 10)]),
            (13, [(10, 13), (3, 10)]),
            (30, [(20, 30)]),
            (39, [(30, 39), (29, 30)]),
        ],
    )
    def test_slots(self, steps, expected):
        assert slot_order(steps, 10) == expected
