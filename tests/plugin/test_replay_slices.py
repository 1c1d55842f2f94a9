"""Slices and start states from a TorchRL replay buffer."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.plugin.trainer import ReplaySlices


def batch(envs: int, steps: int, length: int, first: int = 0) -> TensorDict:
    """What a collector gives: observation (environment, step), episodes of ``length``."""
    step = torch.arange(first, first + steps).expand(envs, steps)
    env = torch.arange(envs).unsqueeze(1).expand(envs, steps)
    done = (step % length == length - 1).unsqueeze(-1)
    data = TensorDict(
        observation=torch.stack([env, step], -1).float(),
        next=TensorDict(done=done, truncated=done, terminated=torch.zeros_like(done), batch_size=[envs, steps]),
        collector=TensorDict(traj_ids=step // length * envs + env, batch_size=[envs, steps]),
        batch_size=[envs, steps],
    )
    return data if envs > 1 else data[0]


def slices(envs: int, ndim: int = 1, **sampler) -> ReplaySlices:
    storage = LazyTensorStorage(400, ndim=ndim)
    buffer = ReplayBuffer(
        storage=storage, sampler=SliceSampler(slice_len=4, **sampler), dim_extend=1 if ndim > 1 else None
    )
    return ReplaySlices(buffer, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("envs", "ndim", "sampler"),
    [(1, 1, {}), (3, 1, {"traj_key": ("collector", "traj_ids")}), (3, 2, {})],
    ids=["one environment", "several in one row", "several in rows of their own"],
)
def test_slices_are_of_one_episode_and_environment(envs, ndim, sampler):
    replay = slices(envs, ndim, **sampler)
    assert not replay.can_sample
    for first in (0, 20):
        data = batch(envs, 20, 10, first)
        assert replay.extend(data) is data
    assert replay.can_sample
    drawn = replay.sample_slices(64)["observation"]
    assert drawn.shape == (64, 4, 2)
    assert (drawn[..., 0] == drawn[:, :1, 0]).all()
    assert (drawn[..., 1].diff(dim=1) == 1).all()
    assert (drawn[:, 0, 1] // 10 == drawn[:, -1, 1] // 10).all()
    assert {tuple(row) for row in drawn[:, 0].tolist()} & {(float(envs - 1), float(s)) for s in range(40)}


def test_start_states_are_of_every_step_of_a_slice():
    replay = slices(1)
    replay.extend(batch(1, 10, 10))
    observations = replay.sample_observations(500)
    assert observations.shape == (500, 2)
    assert set(observations[:, 1].tolist()) == set(map(float, range(10)))


def test_padded_steps_are_no_start_states():
    replay = slices(1, strict_length=False, pad_output=True)
    replay.extend(batch(1, 3, 3))  # shorter than a slice
    assert replay.sample_slices(5).shape == (5, 4)
    assert set(replay.sample_observations(200)[:, 1].tolist()) == {0.0, 1.0, 2.0}


def test_environments_that_the_sampler_cannot_tell_apart():
    with pytest.raises(ConfigurationError, match=r"cannot tell 3 environments apart .* set traj_key="):
        slices(3).extend(batch(3, 20, 10))


def test_slices_of_several_lengths():
    with pytest.raises(ConfigurationError, match="strict_length=False"):
        slices(1, strict_length=False)
