"""Replay buffer: distribution and content of its samples."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from replay_cases import FILLS, H, N, filled, numbered, starts_of

from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.data.replay import STORAGES, STORED_KEYS
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss


@pytest.fixture(params=STORAGES)
def storage(request) -> str:
    """Run the test with every storage."""
    return request.param


class TestSlices:
    @pytest.mark.parametrize("written", FILLS)
    def test_every_valid_start_is_drawn_uniformly_and_no_other(self, written, storage):
        replay = filled(10, written, storage)
        total = sum(written)
        oldest = max(0, total - 10)
        possible = {(t, n) for t in range(oldest, total - H + 1) for n in range(N)}
        draws = 500 * len(possible)
        counts = starts_of(replay.sample_slices(draws))
        assert set(counts) == possible
        # six standard deviations of a binomial count around its mean of 500
        assert all(abs(count - 500) < 6 * 500**0.5 for count in counts.values())

    @pytest.mark.parametrize("written", FILLS)
    def test_a_slice_is_consecutive_steps_of_one_environment(self, written, storage):
        # A slice across the cursor would jump from the newest step to the oldest.
        slices = filled(10, written, storage).sample_slices(400)
        time, env = slices["observation"].unbind(-1)
        assert (time[:, 1:] - time[:, :-1] == 1).all()
        assert (env == env[:, :1]).all()
        following = slices["next", "observation"]
        assert torch.equal(following[:, :-1], slices["observation"][:, 1:])
        assert torch.equal(slices["next", "reward"].squeeze(-1), 100 * time + env)
        assert torch.equal(slices["action"].squeeze(-1), time / 1000)

    def test_batch_shape_and_keys(self, storage):
        slices = filled(10, [8], storage).sample_slices(5)
        assert slices.shape == (5, H)
        keys = set(slices.keys(True, True))
        following = {("next", key) for key in ("observation", "reward", "done", "terminated")}
        assert keys == {"observation", "action"} | following
        assert slices["next", "reward"].shape == (5, H, 1)

    def test_one_environment_and_a_ring_of_one_slice(self, storage):
        replay = TrajectoryReplay(H, 1, H, storage)
        for first in range(0, 6, 2):
            replay.extend(numbered(first, 2, envs=1))
        assert starts_of(replay.sample_slices(20)) == {(2, 0): 20}

    def test_can_sample_only_with_a_whole_slice(self, storage):
        replay = filled(10, [H - 1], storage)
        assert not replay.can_sample
        replay.extend(numbered(H - 1, 1))
        assert replay.can_sample
        assert starts_of(replay.sample_slices(50)).keys() == {(0, n) for n in range(N)}

    def test_sampling_follows_the_global_generator(self, storage):
        replay = filled(10, [9], storage)
        torch.manual_seed(3)
        first = replay.sample_slices(20)
        torch.manual_seed(3)
        assert torch.equal(first["observation"], replay.sample_slices(20)["observation"])


class TestEpisodeEnds:
    def test_steps_past_the_end_stay_in_the_slice(self, storage):
        replay = TrajectoryReplay(20 * N, N, H, storage)
        replay.extend(numbered(0, 20, done_every=5))
        counts = starts_of(replay.sample_slices(4000))
        assert set(counts) == {(t, n) for t in range(20 - H + 1) for n in range(N)}

    def test_they_do_not_reach_the_model_loss(self, storage):
        """The loss and its gradient do not depend on the steps after the end."""
        torch.manual_seed(0)
        replay = TrajectoryReplay(20 * N, N, H, storage)
        replay.extend(numbered(0, 20, done_every=5))
        slices = replay.sample_slices(30)
        done = slices["next", "done"]
        after = (done.long().cumsum(1) - done.long()) > 0
        assert after.any()
        other = slices.clone()
        for key in ("action", ("next", "observation"), ("next", "reward")):
            value = other[key]
            other[key] = torch.where(after, 7.0, value)
        other["next", "terminated"] = other["next", "terminated"] ^ after
        model = make_world_model(WorldModelSpec(2, 1, 16, [8], [8], termination=True))
        loss = PWMModelLoss(model)
        results = []
        for data in (slices, other):
            total = sum(loss(data).values())
            results.append([total, *torch.autograd.grad(total, list(model.parameters()))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    @pytest.mark.parametrize("written", [[], *FILLS])
    def test_episodes_that_are_not_continued(self, written, storage):
        """Only the newest step of each environment becomes the last of its episode."""
        replay = filled(10, written, storage)
        replay.end_episodes()
        replay.extend(numbered(sum(written), H))
        slices = replay.sample_slices(500)
        ends = slices["observation"][slices["next", "done"].squeeze(-1)]
        last = {(sum(written) - 1, n) for n in range(N)} if written else set()
        assert {(int(t), int(n)) for t, n in ends.tolist()} == last
        assert not slices["next", "terminated"].any()


class TestObservations:
    @pytest.mark.parametrize("written", FILLS)
    def test_uniform_over_all_steps(self, written, storage):
        replay = filled(10, written, storage)
        total = sum(written)
        possible = {(t, n) for t in range(max(0, total - 10), total) for n in range(N)}
        counts = Counter((int(t), int(n)) for t, n in replay.sample_observations(500 * len(possible)).tolist())
        assert set(counts) == possible
        assert all(abs(count - 500) < 6 * 500**0.5 for count in counts.values())


class TestCapacity:
    def test_length_counts_transitions(self, storage):
        replay = filled(10, [4], storage)
        assert len(replay) == 4 * N
        replay.extend(numbered(4, 9))
        assert len(replay) == 10 * N

    def test_capacity_is_rounded_down_to_whole_steps(self):
        assert TrajectoryReplay(10 * N + 2, N, H).capacity == 10

    @pytest.mark.parametrize("capacity", [0, N * H - 1])
    def test_less_than_a_slice_is_refused(self, capacity):
        message = rf"training.replay_capacity={capacity} .*algorithm.horizon={H} .*at least {N * H}"
        with pytest.raises(ConfigurationError, match=message):
            TrajectoryReplay(capacity, N, H)

    def test_unknown_storage(self):
        with pytest.raises(ConfigurationError, match=r"'tape'.*memory, disk, device"):
            TrajectoryReplay(100, N, H, storage="tape")

    def test_a_batch_longer_than_the_ring_leaves_its_newest_steps(self, storage):
        replay = filled(10, [3, 26], storage)
        assert set(starts_of(replay.sample_slices(2000))) == {(t, n) for t in range(19, 26) for n in range(N)}


class TestState:
    @pytest.mark.parametrize("written", [[], *FILLS])
    def test_continues_from_a_checkpoint(self, written, storage, tmp_path):
        """Samples are equal after loading, and after more steps are written at the restored cursor."""
        replay = filled(10, written, storage, folder=tmp_path / "one")
        state = replay.state_dict()
        if storage == "disk":
            if written:
                shutil.copytree(tmp_path / "one", tmp_path / "two")
            copy = TrajectoryReplay(10 * N, N, H, storage, tmp_path / "two")
        else:
            copy = filled(10, [6], storage)
        copy.load_state_dict(state)
        first = sum(written)
        for more in (0, 3, 4, 10):
            if more:
                for each in (replay, copy):
                    each.extend(numbered(first, more))
                first += more
            assert len(copy) == len(replay)
            assert copy.can_sample == replay.can_sample
            if not replay.can_sample:
                continue
            samples = []
            for each in (replay, copy):
                torch.manual_seed(more)
                samples.append(each.sample_slices(200))
            assert (samples[0] == samples[1]).all()
            assert len(samples[0].keys(True, True)) == len(STORED_KEYS)
            assert max(t for t, _ in starts_of(samples[1])) == first - H

    def test_the_state_is_a_copy(self):
        replay = filled(10, [10])
        state = replay.state_dict()
        before = {key: value.clone() for key, value in state["data"].items()}
        replay.extend(numbered(10, 5))
        assert all(torch.equal(state["data"][key], value) for key, value in before.items())

    def test_only_what_is_filled_is_saved(self):
        assert filled(10, [3]).state_dict()["data"]["action"].shape == (3, N, 1)

    @pytest.mark.parametrize(("capacity", "envs"), [(10, N + 1), (6, N)])
    def test_another_shape_is_refused(self, capacity, envs, storage, tmp_path):
        state = filled(10, [8], storage, folder=tmp_path).state_dict()
        replay = TrajectoryReplay(capacity * envs, envs, H, storage, tmp_path)
        with pytest.raises(ConfigurationError, match=rf"8 steps of {N} environments.*env\.num_envs={envs}"):
            replay.load_state_dict(state)
