"""Which slices are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage


def draw_starts(count: int, length: int, filled: int, envs: int) -> tuple[Tensor, Tensor]:
    """Uniform starts of slices of ``length`` steps: (steps after the oldest, environment), int64 ``[count]`` each.

    Every storage draws here and from the CPU's generator, so that a seed means the same batches on all of them.
    """
    return torch.randint(filled - length + 1, (count,)), torch.randint(envs, (count,))


class SliceStartSampler(Sampler):
    """Samples slices of ``horizon`` consecutive steps, uniformly over all starts, from a storage ``[time, env]``.

    Constant time per slice, however large the storage: a start is drawn by arithmetic on the ring buffer's cursor
    instead of by searching for trajectories, as :class:`~torchrl.data.SliceSampler` does. A slice never spans the
    cursor, where the newest step lies beside the oldest. It may run past an episode's end; the steps behind the first
    ``done`` belong to the next episode and are masked by the loss, so short episodes are used and never dropped.

    Args:
        horizon (int): steps per slice.
        device (str or torch.device): of the indices. Defaults to ``"cpu"``.
    """

    def __init__(self, horizon: int, device: str | torch.device = "cpu") -> None:
        self.horizon = horizon
        self.device = torch.device(device)
        self.steps = 0  # time steps ever written

    def indices(self, count: int, length: int, capacity: int, envs: int) -> tuple[Tensor, Tensor]:
        """Indices (time, env) of slices, ``[count, length]`` each."""
        filled = min(self.steps, capacity)
        oldest = self.steps % capacity if filled == capacity else 0
        age, env = draw_starts(count, length, filled, envs)
        time = (age.unsqueeze(1) + oldest + torch.arange(length)) % capacity
        return time.to(self.device), env.unsqueeze(1).expand_as(time).to(self.device)

    def sample(self, storage: Storage, batch_size: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Indices ``[batch_size, horizon]`` of (time, env)."""
        capacity, envs = storage.shape[:2]
        return self.indices(batch_size, self.horizon, capacity, envs), {}

    def _empty(self) -> None:
        self.steps = 0

    def dumps(self, path: str | Path) -> None:
        """Nothing to write: the replay saves the cursor."""

    def loads(self, path: str | Path) -> None:
        """Nothing to read: the replay restores the cursor."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
