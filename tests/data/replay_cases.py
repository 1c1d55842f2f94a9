"""Steps whose entries encode their position."""

from __future__ import annotations

from collections import Counter

import torch
from tensordict import TensorDict

from pwm_torchrl.data import SegmentStore, TrajectoryReplay

N, H = 3, 4


def numbered(first: int, steps: int, done_every: int | None = None, envs: int = N) -> TensorDict:
    """Steps ``first`` .. of N environments; every entry encodes its step and environment."""
    t = torch.arange(first, first + steps).view(1, -1, 1).expand(envs, -1, -1).float()
    n = torch.arange(envs).view(-1, 1, 1).expand(-1, steps, -1).float()
    done = torch.zeros(envs, steps, 1, dtype=torch.bool)
    if done_every is not None:
        done = (t.long() + 1) % done_every == 0
    size = [envs, steps]
    following = TensorDict(
        observation=torch.cat([t + 1, n], -1),
        reward=100 * t + n,
        done=done,
        terminated=done,
        truncated=torch.zeros_like(done),
        batch_size=size,
    )
    return TensorDict(observation=torch.cat([t, n], -1), action=t / 1000, next=following, latent=t, batch_size=size)


def filled(capacity_steps: int, written: list[int], storage: str = "memory", **kwargs) -> TrajectoryReplay:
    """A replay with numbered batches of these lengths."""
    replay = TrajectoryReplay(capacity_steps * N, N, H, storage, **kwargs)
    first = 0
    for steps in written:
        replay.extend(numbered(first, steps))
        first += steps
    return replay


def starts_of(slices: TensorDict) -> Counter:
    """Number of slices that begin at each (step, environment)."""
    return Counter((int(t), int(n)) for t, n in slices["observation"][:, 0].tolist())


# Written in pieces: not full, exactly full, wrapped, wrapped several times, and pieces that do not divide the ring.
FILLS = [[H], [3, 4], [5, 5], [5, 5, 3], [4] * 9, [7, 7, 7, 7]]


def random_steps(steps: int, envs: int, observation_dim: int = 2, action_dim: int = 1) -> TensorDict:
    """Random steps ``[N, T]``, an eighth of which end their episode."""
    done = torch.rand(envs, steps, 1) < 0.125
    following = TensorDict(
        observation=torch.randn(envs, steps, observation_dim),
        reward=torch.randn(envs, steps, 1),
        done=done,
        terminated=done & (torch.rand(envs, steps, 1) < 0.5),
        batch_size=[envs, steps],
    )
    return TensorDict(
        observation=torch.randn(envs, steps, observation_dim),
        action=torch.randn(envs, steps, action_dim),
        next=following,
        batch_size=[envs, steps],
    )


def store_in(folder, capacity=10, segment=4, steps=0, **kwargs) -> SegmentStore:
    """A store with numbered steps."""
    store = SegmentStore(folder, capacity, N, H, segment, **kwargs)
    for first in range(0, steps, 3):
        store.extend(numbered(first, min(3, steps - first)))
    return store


def times(store: SegmentStore) -> set[int]:
    """The steps that can be sampled."""
    return set(store.slices(500)["observation"][..., 0].flatten().int().tolist())
