"""Replay in RAM or on a device: a ring of the newest steps in a TorchRL buffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer

from pwm_torchrl.data.layout import STORED_KEYS, key_name, refuse_other_shape
from pwm_torchrl.data.sampler import SliceStartSampler


class RingStore:
    """Steps of N environments in a :class:`~torchrl.data.ReplayBuffer` over tensors ``[time, env]``.

    Args:
        capacity (int): time steps.
        num_envs (int): ``N``.
        horizon (int): steps per slice.
        device (str or torch.device): of the tensors. Defaults to ``"cpu"``.
    """

    def __init__(self, capacity: int, num_envs: int, horizon: int, device: str | torch.device = "cpu") -> None:
        self.capacity = capacity
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.sampler = SliceStartSampler(horizon, device)
        storage = LazyTensorStorage(capacity * num_envs, ndim=2, device=device)
        # Not TensorDictReplayBuffer: its bookkeeping of indices fails on batches of one step.
        self.buffer = ReplayBuffer(storage=storage, sampler=self.sampler, dim_extend=1)

    @property
    def steps(self) -> int:
        """Time steps ever written."""
        return self.sampler.steps

    @property
    def filled(self) -> int:
        """Time steps that can be sampled."""
        return min(self.steps, self.capacity)

    def extend(self, batch: TensorDictBase) -> None:
        """Add a batch ``[N, T]``."""
        self.buffer.extend(batch)
        self.sampler.steps += batch.shape[1]

    def end_episodes(self) -> None:
        """Mark the newest step of every environment as the last of its episode."""
        if self.steps:
            newest = (self.steps - 1) % self.capacity
            self.buffer.storage.get(slice(newest, newest + 1))["next", "done"].fill_(True)

    def slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        return self.buffer.sample(count).exclude("index")

    def observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        time, env = self.sampler.indices(count, 1, self.capacity, self.num_envs)
        return self.buffer.storage.get((time.squeeze(1), env.squeeze(1))).get("observation")

    def release(self, kept: int | None) -> None:
        """Nothing to delete: a checkpoint holds its own copy of the data."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of the filled part of the storage on the CPU, first slot first, and the cursor."""
        data = {}
        if self.filled:
            stored = self.buffer.storage.get(slice(0, self.filled))
            data = {key_name(key): stored.get(key).to("cpu", copy=True) for key in STORED_KEYS}
        return {"steps": self.steps, "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, cursor included.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
        """
        steps, data = state_dict["steps"], state_dict["data"]
        if data:
            filled, envs = data["action"].shape[:2]
            refuse_other_shape(filled, envs, steps, self.num_envs, self.capacity)
        self.fill(steps, [state_slots(data)] if data else [])

    def fill(self, steps: int, parts: Iterable[TensorDictBase]) -> None:
        """Replace the content by parts ``[time, env]`` of the slots in order; ``steps`` were ever written."""
        self.buffer.empty()
        for part in parts:
            self.buffer.extend(part.transpose(0, 1))
        # A full ring is written back as it lay, so the next write must continue at the old cursor.
        self.buffer.writer._cursor = steps % self.capacity
        self.sampler.steps = steps


def state_slots(data: dict[str, Tensor], start: int = 0, stop: int | None = None) -> TensorDict:
    """Slots of a state's data as ``[time, env]``."""
    entries = {key: data[key_name(key)][start:stop] for key in STORED_KEYS}
    out = TensorDict({}, batch_size=entries["action"].shape[:2])
    for key, value in entries.items():
        out.set(key, value)
    return out
