"""Sampling of slices from an episode store, and its split into training and validation episodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pwm_torchrl.data.episodes.store import EpisodeStore
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "SliceIndex",
    "evenly_spaced",
    "split_episodes",
]


Ints = npt.NDArray[np.int64]
#: Advice in error messages if episodes are shorter than slices.
SHORTER = "shorter slices (algorithm.slice_steps, or algorithm.horizon where that is null)"
_LARGE = 1 << 62


class SliceIndex:
    """Samples slices of ``horizon`` transitions within one episode.

    An episode of L transitions has L − horizon + 1 starts. Sampling draws a number below the total number of starts and
    finds its episode by bisection in the cumulative sum, so its time hardly depends on the size of the store.

    Args:
        store (EpisodeStore): the store.
        horizon (int): H, transitions per slice.

    Keyword Args:
        tasks (sequence of int, optional): indices of the tasks to sample. Defaults to ``None``, all that have data.
        episodes (numpy.ndarray, optional): numbers of the episodes to sample. Defaults to ``None``, all.
        balanced (bool): draw a task uniformly, then one of its starts; otherwise draw uniformly from all starts.
            Defaults to ``False``.

    Raises:
        ConfigurationError: if there are no starts, or one of ``tasks`` has none.

    Attributes:
        num_starts (int): number of valid starts.
        episodes (numpy.ndarray): numbers of the chosen episodes, including those shorter than the horizon.
    """

    def __init__(
        self,
        store: EpisodeStore,
        horizon: int,
        *,
        tasks: Sequence[int] | None = None,
        episodes: Ints | None = None,
        balanced: bool = False,
    ) -> None:
        if horizon < 1:
            raise ConfigurationError(f"horizon={horizon} is too small; it must be at least 1")
        chosen = np.arange(store.num_episodes) if episodes is None else np.sort(np.asarray(episodes, dtype=np.int64))
        if tasks is not None:
            chosen = chosen[np.isin(store.task[chosen], np.asarray(list(tasks), dtype=np.int64))]
        # Sorted by task, so that the starts of a task are one range of the cumulative sum.
        chosen = chosen[np.argsort(store.task[chosen], kind="stable")]
        self.episodes = chosen
        self._first, length = store.first_row[chosen], store.length[chosen]
        self._starts = _Ranges(np.maximum(length - horizon + 1, 0))
        self._rows = _Ranges(length + 1)
        self.num_starts = self._starts.total
        self._balanced = balanced
        counts = np.bincount(store.task[chosen], self._starts.counts, len(store.task_names)).astype(np.int64)
        _check(store, horizon, tasks, counts)
        ends = counts.cumsum()
        present = np.flatnonzero(counts)
        self._task_counts, self._task_first = counts[present], (ends - counts)[present]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Ints:
        """Draw the first rows of ``count`` slices with replacement, int64 ``[count]``.

        Args:
            count (int): number of slices.
            generator (torch.Generator, optional): a CPU generator. Defaults to ``None``, torch's global one.
        """
        if not self._balanced:
            drawn = _integers(self.num_starts, count, generator)
        else:
            task = _integers(len(self._task_counts), count, generator)
            drawn = self._task_first[task] + _integers(_LARGE, count, generator) % self._task_counts[task]
        return self._first_rows(drawn)

    def evenly_spaced(self, most: int) -> Ints:
        """First rows of at most ``most`` slices, evenly spaced over all slices; draws no random numbers."""
        return self._first_rows(evenly_spaced(self.num_starts, most))

    def _first_rows(self, starts: Ints) -> Ints:
        episode, offset = self._starts.locate(starts)
        return self._first[episode] + offset

    def observation_rows(self, count: int, generator: torch.Generator | None = None) -> Ints:
        """Draw rows of ``count`` observations uniformly from the chosen episodes, int64 ``[count]``."""
        episode, offset = self._rows.locate(_integers(self._rows.total, count, generator))
        return self._first[episode] + offset


class _Ranges:
    """Consecutive ranges of integers; finds the range of a number and its offset in it."""

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        self.ends = counts.cumsum()
        self.total = int(self.ends[-1]) if len(counts) else 0

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        # side="right" skips empty ranges.
        found = np.searchsorted(self.ends, numbers, side="right")
        return found, numbers - self.ends[found] + self.counts[found]


def _integers(below: int, count: int, generator: torch.Generator | None) -> Ints:
    return torch.randint(below, (count,), generator=generator).numpy()


def _check(store: EpisodeStore, horizon: int, tasks: Sequence[int] | None, counts: Ints) -> None:
    """Raise an error if a task has no start."""
    for task in () if tasks is None else tasks:
        if not 0 <= task < len(counts):
            raise ConfigurationError(
                f"task index {task} is not in the episode store {store.path}, which has {len(counts)} tasks"
            )
        if not counts[task]:
            raise ConfigurationError(
                f"task {store.task_names[task]!r} has no episode of at least {horizon} transitions in the episode "
                f"store {store.path}; choose other tasks, {SHORTER}, or import data of it"
            )
    if not counts.any():
        raise ConfigurationError(
            f"the episode store {store.path} has no chosen episode of at least {horizon} transitions; choose other "
            f"data, or {SHORTER}"
        )


def evenly_spaced(count: int, most: int) -> Ints:
    """At most ``most`` distinct, evenly spaced numbers below ``count``, int64."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def split_episodes(store: EpisodeStore, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Split a store's episodes into training and validation, with the same fraction for each task.

    The split depends only on the store's episode table and the arguments. It does not use a library's random numbers,
    which may change between versions. A task with two or more episodes has at least one on each side.

    Args:
        store (EpisodeStore): the store.
        fraction (float): fraction of validation episodes, in (0, 1).
        seed (int): seed of the split.

    Returns:
        tuple of numpy.ndarray: increasing numbers of the training episodes and of the validation episodes.

    Raises:
        ConfigurationError: if ``fraction`` is not in (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigurationError(f"the validation fraction {fraction} is not between 0 and 1")
    held_out = np.zeros(store.num_episodes, dtype=bool)
    order = _mixed(np.arange(store.num_episodes, dtype=np.uint64), seed)
    for task in range(len(store.task_names)):
        members = np.flatnonzero(store.task == task)
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out[members[np.argsort(order[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mixed(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random numbers, a fixed function of each number and the seed (SplitMix64, applied twice)."""
    state = np.full_like(numbers, seed & (1 << 64) - 1)
    for addend in (numbers, np.uint64(0)):
        state = state + addend + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
