"""Replay of parallel trajectories, sampled as slices by index arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from pwm_torchrl.errors import ConfigurationError

STORAGES = ("memory", "disk")
#: What is kept of a collected batch.
STORED_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
)


class SliceStartSampler(Sampler):
    """Samples slices of ``horizon`` consecutive steps, uniformly over all starts, from a storage ``[time, env]``.

    Constant time per slice, however large the storage: a start is drawn by arithmetic on the ring buffer's cursor
    instead of by searching for trajectories, as :class:`~torchrl.data.SliceSampler` does. A slice never spans the
    cursor, where the newest step lies beside the oldest. It may run past an episode's end; the steps behind the first
    ``done`` belong to the next episode and are masked by the loss, so short episodes are used and never dropped.

    Args:
        horizon (int): steps per slice.
    """

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self.steps = 0  # time steps ever written

    def starts(self, count: int, length: int, filled: int, capacity: int, envs: int) -> tuple[Tensor, Tensor]:
        """Uniform (time, env) indices ``[count]`` of steps that ``length - 1`` further steps follow."""
        age = torch.randint(filled - length + 1, (count,))
        oldest = self.steps % capacity if filled == capacity else 0
        return (age + oldest) % capacity, torch.randint(envs, (count,))

    def sample(self, storage: Storage, batch_size: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Indices ``[batch_size, horizon]`` of (time, env)."""
        capacity, envs = storage.shape[:2]
        filled = min(self.steps, capacity)
        time, env = self.starts(batch_size, self.horizon, filled, capacity, envs)
        time = (time.unsqueeze(1) + torch.arange(self.horizon)) % capacity
        return (time, env.unsqueeze(1).expand_as(time)), {}

    def _empty(self) -> None:
        self.steps = 0

    def dumps(self, path: str | Path) -> None:
        """Nothing to write: :class:`TrajectoryReplay` saves the cursor."""

    def loads(self, path: str | Path) -> None:
        """Nothing to read: :class:`TrajectoryReplay` restores the cursor."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class TrajectoryReplay:
    """The last transitions of N parallel environments, in a :class:`~torchrl.data.ReplayBuffer`.

    Args:
        capacity (int): transitions; rounded down to a multiple of ``num_envs``.
        num_envs (int): N.
        horizon (int): steps per sampled slice.
        storage (str): ``"memory"``, or ``"disk"`` for memory-mapped files. Defaults to ``"memory"``.
        scratch_dir (Path, optional): where the files of ``"disk"`` go. Defaults to ``None``: a temporary folder.
        device (str or torch.device): of the sampled tensors. Defaults to ``"cpu"``.

    Raises:
        ConfigurationError: if the storage is unknown or the capacity holds less than one slice per environment.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        horizon: int,
        storage: str = "memory",
        scratch_dir: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if storage not in STORAGES:
            raise ConfigurationError(f"training.replay_storage={storage!r} is not one of {', '.join(STORAGES)}.")
        if capacity < num_envs * horizon:
            raise ConfigurationError(
                f"training.replay_capacity={capacity} holds less than one slice of algorithm.horizon={horizon} steps "
                f"for each of {num_envs} environments; at least {num_envs * horizon} transitions are needed."
            )
        self.num_envs = num_envs
        self.horizon = horizon
        self.capacity = capacity // num_envs  # time steps
        self.device = torch.device(device)
        self.sampler = SliceStartSampler(horizon)
        size = self.capacity * num_envs
        backend = (
            LazyTensorStorage(size, ndim=2)
            if storage == "memory"
            else LazyMemmapStorage(size, ndim=2, scratch_dir=scratch_dir, existsok=True)  # a resumed run's are there
        )
        # Not TensorDictReplayBuffer: its bookkeeping of indices fails on batches of one step.
        self.buffer = ReplayBuffer(storage=backend, sampler=self.sampler, dim_extend=1)

    def __len__(self) -> int:
        return min(self.sampler.steps, self.capacity) * self.num_envs

    @property
    def collected(self) -> int:
        """Transitions ever added, those that were overwritten too."""
        return self.sampler.steps * self.num_envs

    def extend(self, batch: TensorDictBase) -> None:
        """Add a collected batch ``[N, T]``."""
        self.buffer.extend(batch.select(*STORED_KEYS).detach().cpu())
        self.sampler.steps += batch.shape[1]

    def end_episodes(self) -> None:
        """Mark the newest steps as the last of their episodes: what is added next does not continue them."""
        if self.sampler.steps:
            newest = (self.sampler.steps - 1) % self.capacity
            self.buffer.storage.get(slice(newest, newest + 1))["next", "done"].fill_(True)

    @property
    def can_sample(self) -> bool:
        """Whether there is a whole slice."""
        return self.sampler.steps >= self.horizon

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        return self.buffer.sample(count).exclude("index").to(self.device)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        filled = min(self.sampler.steps, self.capacity)
        index = self.sampler.starts(count, 1, filled, self.capacity, self.num_envs)
        return self.buffer.storage.get(index).get("observation").to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """The filled part of the storage, oldest slot first as it lies, and the cursor."""
        filled = min(self.sampler.steps, self.capacity)
        data = {}
        if filled:
            stored = self.buffer.storage.get((torch.arange(filled),))
            data = {_name(key): stored.get(key) for key in STORED_KEYS}
        return {"steps": self.sampler.steps, "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, cursor included."""
        self.buffer.empty()
        steps, data = state_dict["steps"], state_dict["data"]
        if not data:
            return
        batch = TensorDict({}, batch_size=data["action"].shape[:2])
        for key in STORED_KEYS:
            batch.set(key, data[_name(key)])
        filled, envs = batch.shape
        if envs != self.num_envs or filled != min(steps, self.capacity):
            raise ConfigurationError(
                f"The checkpoint's replay holds {filled} steps of {envs} environments; this configuration has "
                f"env.num_envs={self.num_envs} and room for {self.capacity} steps."
            )
        self.buffer.extend(batch.transpose(0, 1))
        # A full ring is written back as it lay, so the next write must continue at the old cursor.
        self.buffer.writer._cursor = steps % self.capacity
        self.sampler.steps = steps


def _name(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else ".".join(key)
