"""Stored episodes as what updates draw from, in place of a replay and a collector."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.data.episodes import EpisodeStore, SliceIndex
from pwm_torchrl.data.episodes.index import store_bytes
from pwm_torchrl.memory.readings import Reading, read_memory


class StoredSamples:
    """Slices and observations of some of a store's tasks, in the widths and with the task indices of a model.

    Drawing takes PyTorch's global random numbers, so that a resumed run goes on with the same draws.

    Args:
        store (EpisodeStore): the episodes.
        tasks (sequence of str): names of the tasks to draw from; a task's index is its place here.
        horizon (int): steps per slice.
        observation_dim (int): O of what is drawn; the store's padding beyond it is left out.
        action_dim (int): A of what is drawn.

    Keyword Args:
        episodes (array of int, optional): numbers of the episodes to draw from. Defaults to ``None``, all.
        balanced (bool): draw tasks with equal probability. Defaults to ``False``.
        labelled (bool): whether slices name their task. Defaults to ``True``.
        device (torch.device): where samples go. Defaults to the CPU.
        ahead (bool, optional): ask the disk for all pages of a batch at once. Defaults to ``None``: if the store is
            larger than the memory that could keep it, see :func:`outgrows_memory`.

    Drawing raises ConfigurationError if one of the tasks has no slice of ``horizon`` steps.
    """

    def __init__(
        self,
        store: EpisodeStore,
        tasks: Sequence[str],
        horizon: int,
        observation_dim: int,
        action_dim: int,
        *,
        episodes: np.ndarray | None = None,
        balanced: bool = False,
        labelled: bool = True,
        device: torch.device | str = "cpu",
        ahead: bool | None = None,
    ) -> None:
        self.store, self.tasks, self.horizon, self.labelled = store, tuple(tasks), horizon, labelled
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.device = torch.device(device)
        numbers = [store.task_names.index(name) for name in tasks]
        self.episodes = np.arange(store.num_episodes) if episodes is None else episodes
        self._balanced = balanced
        self._ahead = outgrows_memory(store) if ahead is None else ahead
        #: From the store's task numbers to places in ``tasks``; -1 where a task is not drawn.
        self._place = torch.full((len(store.task_names),), -1)
        self._place[numbers] = torch.arange(len(numbers))

    @functools.cached_property
    def index(self) -> SliceIndex:
        """Where slices begin."""
        numbers = [self.store.task_names.index(name) for name in self.tasks]
        return SliceIndex(self.store, self.horizon, tasks=numbers, episodes=self.episodes, balanced=self._balanced)

    @property
    def can_sample(self) -> bool:
        """Whether there is a whole slice."""
        return self.index.num_starts > 0

    @property
    def collected(self) -> int:
        """Transitions of the store."""
        return self.store.num_transitions

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``."""
        return self.slices(self.index.sample(count))

    def slices(self, rows: np.ndarray) -> TensorDictBase:
        """The slices that begin at ``rows``."""
        if self._ahead:
            self.store.prefetch(rows, self.horizon)
        slices = self.store.slices(rows, self.horizon)
        slices["observation"] = slices["observation"][..., : self.observation_dim]
        slices["next", "observation"] = slices["next", "observation"][..., : self.observation_dim]
        slices["action"] = slices["action"][..., : self.action_dim]
        if self.labelled:
            slices["task"] = self._place[slices["task"]]
        else:
            del slices["task"]
        return self._moved(slices)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all rows."""
        observations = self.store.observations(self.index.observation_rows(count))
        observations = observations[..., : self.observation_dim]
        return observations.to(self.device)

    def of_task(self, name: str) -> SliceIndex | None:
        """The slices of one task among those drawn from; ``None`` if it has none."""
        number = self.store.task_names.index(name)
        long = self.store.length[self.episodes] >= self.horizon
        if not np.any((self.store.task[self.episodes] == number) & long):
            return None
        return SliceIndex(self.store, self.horizon, tasks=[number], episodes=self.episodes)

    def _moved(self, slices: TensorDictBase) -> TensorDictBase:
        if self.device.type != "cuda":
            return slices
        return slices.pin_memory().to(self.device, non_blocking=True)


def outgrows_memory(store: EpisodeStore, reading: Reading | None = None) -> bool:
    """Whether a store is larger than the memory that this process may use, its page cache included.

    Args:
        store (EpisodeStore): the episodes.
        reading (Reading, optional): memory. Defaults to ``None``, what there is now.
    """
    reading = read_memory() if reading is None else reading
    most = [group.limit for group in reading.limits if group.limit is not None]
    if reading.machine is not None:
        most.append(reading.machine.total)
    files, _ = store_bytes(store.path)
    return bool(most) and files > min(most)


class StoredEpochs:
    """Source of a trainer whose data are there already: epoch after epoch without any collection."""

    requested_frames_per_batch = 1  # the trainer's measure of an epoch
    init_random_frames = 0
    resumed_exactly = True

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield TensorDict({}, batch_size=[1])

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing runs beside."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""
