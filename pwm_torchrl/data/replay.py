"""Replay buffer of parallel trajectories, in memory, on a device or on disk."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from pwm_torchrl.data.layout import STORED_KEYS, draw_starts, key_name, refuse_other_shape
from pwm_torchrl.data.segments import SegmentStore
from pwm_torchrl.devices import to_device
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import refuse_memory
from pwm_torchrl.memory.storage import record_bytes

__all__ = [
    "STORAGES",
    "STORED_KEYS",
    "SliceStartSampler",
    "TrajectoryReplay",
]

# Ring buffer in RAM or on a device ------------------------------------------------------------------------------------


class SliceStartSampler(Sampler):
    """Samples slices of ``horizon`` consecutive steps, uniformly over all starts, from a storage ``[time, env]``.

    The time per slice does not depend on the size of the storage: starts are computed from the ring buffer's cursor,
    while :class:`~torchrl.data.SliceSampler` searches for trajectories. A slice never spans the cursor, where the
    newest step is next to the oldest. It may continue past the end of an episode; the loss masks the steps after the
    first ``done``, so short episodes are used, too.

    Args:
        horizon (int): steps per slice.
        device (str or torch.device): device of the indices. Defaults to ``"cpu"``.
    """

    def __init__(self, horizon: int, device: str | torch.device = "cpu") -> None:
        self.horizon = horizon
        self.device = torch.device(device)
        self.steps = 0  # total number of time steps written

    def indices(self, count: int, length: int, capacity: int, envs: int) -> tuple[Tensor, Tensor]:
        """Indices (time, env) of slices, ``[count, length]`` each."""
        filled = min(self.steps, capacity)
        oldest = self.steps % capacity if filled == capacity else 0
        age, env = draw_starts(count, length, filled, envs)
        time = (age.unsqueeze(1) + oldest + torch.arange(length)) % capacity
        return to_device(time, self.device), to_device(env, self.device).unsqueeze(1).expand_as(time)

    def sample(self, storage: Storage, batch_size: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Indices ``[batch_size, horizon]`` of (time, env)."""
        capacity, envs = storage.shape[:2]
        return self.indices(batch_size, self.horizon, capacity, envs), {}

    def _empty(self) -> None:
        self.steps = 0

    def dumps(self, path: str | Path) -> None:
        """No-op: the replay buffer saves the cursor."""

    def loads(self, path: str | Path) -> None:
        """No-op: the replay buffer restores the cursor."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class RingStore:
    """Steps of N environments in a :class:`~torchrl.data.ReplayBuffer` over tensors ``[time, env]``.

    Args:
        capacity (int): time steps.
        num_envs (int): ``N``.
        horizon (int): steps per slice.
        device (str or torch.device): device of the tensors. Defaults to ``"cpu"``.
    """

    def __init__(self, capacity: int, num_envs: int, horizon: int, device: str | torch.device = "cpu") -> None:
        self.capacity = capacity
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.sampler = SliceStartSampler(horizon, device)
        storage = LazyTensorStorage(capacity * num_envs, ndim=2, device=device)
        # TensorDictReplayBuffer cannot be used: its index bookkeeping fails on batches of one step.
        self.buffer = ReplayBuffer(storage=storage, sampler=self.sampler, dim_extend=1)

    @property
    def steps(self) -> int:
        """Total number of time steps written."""
        return self.sampler.steps

    @property
    def filled(self) -> int:
        """Number of time steps that can be sampled."""
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
        """No-op: a checkpoint contains its own copy of the data."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of the filled part of the storage on the CPU, in slot order, and the cursor."""
        data = {}
        if self.filled:
            stored = self.buffer.storage.get(slice(0, self.filled))
            data = {key_name(key): stored.get(key).to("cpu", copy=True) for key in STORED_KEYS}
        return {"steps": self.steps, "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the data and the cursor from :meth:`state_dict`.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
        """
        steps, data = state_dict["steps"], state_dict["data"]
        if data:
            filled, envs = data["action"].shape[:2]
            refuse_other_shape(filled, envs, steps, self.num_envs, self.capacity)
        self.fill(steps, [state_slots(data)] if data else [])

    def fill(self, steps: int, parts: Iterable[TensorDictBase]) -> None:
        """Replace the content by parts ``[time, env]`` in slot order; ``steps`` counts all steps written."""
        self.buffer.empty()
        for part in parts:
            self.buffer.extend(part.transpose(0, 1))
        # The slots keep their order, so the next write must continue at the saved cursor.
        self.buffer.writer._cursor = steps % self.capacity
        self.sampler.steps = steps


def state_slots(data: dict[str, Tensor], start: int = 0, stop: int | None = None) -> TensorDict:
    """Slots ``start`` to ``stop`` of a saved state's data as ``[time, env]``."""
    entries = {key: data[key_name(key)][start:stop] for key in STORED_KEYS}
    out = TensorDict({}, batch_size=entries["action"].shape[:2])
    for key, value in entries.items():
        out.set(key, value)
    return out


# Conversion of checkpoints between storage on disk and in RAM ---------------------------------------------------------


#: Time steps copied at once.
PART = 1024


def slot_order(steps: int, capacity: int) -> list[tuple[int, int]]:
    """The steps in a ring buffer, as ranges (first, last + 1) in slot order."""
    oldest = max(0, steps - capacity)
    # Step t is in slot t % capacity; the seam is the oldest step that is in slot 0.
    seam = -(-oldest // capacity) * capacity
    return [part for part in ((seam, steps), (oldest, min(seam, steps))) if part[0] < part[1]]


def in_parts(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Split ranges (first, last + 1) into ranges of at most :data:`PART` steps."""
    for first, last in ranges:
        for start in range(first, last, PART):
            yield start, min(start + PART, last)


def disk_to_ring(source: SegmentStore, ring: RingStore) -> None:
    """Fill a ring buffer with the steps of a store on disk."""
    env = torch.arange(source.num_envs)

    def slots() -> Iterator[TensorDictBase]:
        for first, last in in_parts(slot_order(source.steps, source.capacity)):
            yield source.get(torch.full_like(env, first), env, last - first).transpose(0, 1).to(ring.device)

    ring.fill(source.steps, slots())


def ring_to_disk(state_dict: dict[str, Any], store: SegmentStore) -> None:
    """Fill a store on disk with the saved state of a ring buffer.

    Raises:
        ConfigurationError: if the state has another number of environments or another capacity.
        StorageFault: if it cannot be written.
    """
    data, steps = state_dict["data"], state_dict["steps"]
    filled, envs = data["action"].shape[:2] if data else (0, store.num_envs)
    refuse_other_shape(filled, envs, steps, store.num_envs, store.capacity)
    store.begin_at(steps - filled)
    for first, last in in_parts(slot_order(steps, filled)[::-1] if data else []):
        slot = first % filled
        store.extend(state_slots(data, slot, slot + last - first).transpose(0, 1))


# Replay buffer with a choice of storage -------------------------------------------------------------------------------


STORAGES = ("memory", "disk", "device")


class TrajectoryReplay:
    """Replay buffer of the newest transitions of N parallel environments.

    The storage only determines where the data are: the same seed draws the same slices from all storages, and a
    checkpoint of one can be loaded into another.

    Args:
        capacity (int): transitions; rounded down to a multiple of ``num_envs``.
        num_envs (int): ``N``.
        horizon (int): steps per sampled slice.
        storage (str): ``"memory"`` for host RAM, ``"disk"`` for files (:class:`~pwm_torchrl.data.SegmentStore`),
            ``"device"`` for the memory of ``device``. Defaults to ``"memory"``.
        folder (Path, optional): folder of the files of ``"disk"``, also for loading a checkpoint of a replay on disk
            into another storage. Defaults to ``None``: a temporary folder, deleted with this object.
        device (str or torch.device): device of the sampled tensors. Defaults to ``"cpu"``.
        observation_dim (int, optional): O; with ``action_dim``, a disk with too little space is refused now instead of
            with the first batch. Defaults to ``None``.
        action_dim (int, optional): ``A``. Defaults to ``None``.
        since_checkpoint_steps (int): maximum number of time steps written since the oldest checkpoint kept, which need
            disk space in addition to the capacity; see :func:`~pwm_torchrl.data.steps_since_checkpoint`. Defaults to
            ``0``.

    Raises:
        ConfigurationError: if the storage is unknown, its folder is in RAM, or the capacity is less than one slice per
            environment.
        StorageFault: if the disk has too little space.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        horizon: int,
        storage: str = "memory",
        folder: Path | None = None,
        device: str | torch.device = "cpu",
        *,
        observation_dim: int | None = None,
        action_dim: int | None = None,
        since_checkpoint_steps: int = 0,
    ) -> None:
        if storage not in STORAGES:
            raise ConfigurationError(f"training.replay_storage={storage!r} is not one of {', '.join(STORAGES)}.")
        if capacity < num_envs * horizon:
            raise ConfigurationError(
                f"training.replay_capacity={capacity} is less than one slice of algorithm.horizon={horizon} steps "
                f"for each of {num_envs} environments; at least {num_envs * horizon} transitions are needed."
            )
        self.num_envs = num_envs
        self.horizon = horizon
        self.capacity = capacity // num_envs  # time steps
        self.device = torch.device(device)
        self.folder = folder
        self.store: RingStore | SegmentStore
        if storage == "disk":
            folder = self._temporary_folder() if folder is None else folder
            refuse_memory(folder)
            self.store = SegmentStore(
                folder, self.capacity, num_envs, horizon, since_checkpoint_steps=since_checkpoint_steps
            )
            if observation_dim is not None and action_dim is not None:
                self.store.require_space(record_bytes(observation_dim, action_dim))
        else:
            self.store = RingStore(
                self.capacity, num_envs, horizon, self.device if storage == "device" else torch.device("cpu")
            )

    def _temporary_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="pwm_torchrl_replay_"))
        weakref.finalize(self, rmtree, folder, ignore_errors=True)
        return folder

    def __len__(self) -> int:
        return self.store.filled * self.num_envs

    @property
    def buffer(self) -> ReplayBuffer:
        """The TorchRL replay buffer; a replay on disk has none."""
        assert isinstance(self.store, RingStore), "a replay on disk has no TorchRL buffer"
        return self.store.buffer

    @property
    def steps(self) -> int:
        """Total number of time steps added."""
        return self.store.steps

    @property
    def collected(self) -> int:
        """Total number of transitions added, including overwritten ones."""
        return self.steps * self.num_envs

    def extend(self, batch: TensorDictBase) -> None:
        """Add a collected batch ``[N, T]``.

        Raises:
            StorageFault: if it cannot be written; the replay is then unchanged.
        """
        device = self.store.device if isinstance(self.store, RingStore) else torch.device("cpu")
        self.store.extend(batch.select(*STORED_KEYS).detach().to(device))

    def end_episodes(self) -> None:
        """Mark the newest steps as the last of their episodes, because the next batch does not continue them."""
        self.store.end_episodes()

    @property
    def can_sample(self) -> bool:
        """Whether there are enough steps for one slice."""
        return self.steps >= self.horizon

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        return to_device(self.store.slices(count), self.device)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        return to_device(self.store.observations(count), self.device)

    def release(self, kept: int | None) -> None:
        """Delete files that neither sampling nor a checkpoint needs.

        Args:
            kept (int, optional): :attr:`steps` at the oldest checkpoint that can be resumed; ``None`` if there is none.
        """
        self.store.release(kept)

    def state_dict(self) -> dict[str, Any]:
        """Counters and a copy of the data; data on disk are not copied, but flushed to the disk."""
        return self.store.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`, of the same or another storage.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
            StorageFault: if its data are no longer in the folder, or do not fit there.
        """
        store, from_disk = self.store, "writer" in state_dict
        if isinstance(store, SegmentStore) == from_disk:
            store.load_state_dict(state_dict)
        elif isinstance(store, SegmentStore):
            ring_to_disk(state_dict, store)
        elif self.folder is not None:
            source = SegmentStore(self.folder, self.capacity, self.num_envs, self.horizon)
            source.load_state_dict(state_dict)
            disk_to_ring(source, store)
        else:
            raise ConfigurationError(
                "The checkpoint's replay is on disk, and this replay has no folder to read it from; set "
                "training.replay_storage=disk."
            )
