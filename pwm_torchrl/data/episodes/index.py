"""Where slices of stored episodes begin, and how large a store is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pwm_torchrl.data.episodes.store import EpisodeStore
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "SliceIndex",
    "split_episodes",
]

# Which rows are drawn from an episode store, by arithmetic on its table of episodes -----------------------------------


Ints = npt.NDArray[np.int64]
_LARGE = 1 << 62


class SliceIndex:
    """Draws slices of ``horizon`` transitions that lie inside one episode.

    An episode of L transitions has L − horizon + 1 starts. A number below the count of all starts is drawn and its
    episode found by bisection in the running sum, so that a draw takes as long in a small store as in a large one.

    Args:
        store (EpisodeStore): the store.
        horizon (int): H, transitions per slice.

    Keyword Args:
        tasks (sequence of int, optional): indices of tasks to draw from. Defaults to ``None``, all that have data.
        episodes (numpy.ndarray, optional): numbers of episodes to draw from. Defaults to ``None``, all.
        balanced (bool): draw a task first, each with the same probability, then one of its starts; else all starts
            have the same probability. Defaults to ``False``.

    Raises:
        ConfigurationError: if there is nothing to draw from, or nothing of one of ``tasks``.

    Attributes:
        num_starts (int): valid starts.
        episodes (numpy.ndarray): numbers of the chosen episodes, the short ones too.
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
        # One task's episodes lie together, so that its starts are one range of the running sum.
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
        """First rows of ``count`` slices, int64 ``[count]``, drawn with replacement.

        Args:
            count (int): slices.
            generator (torch.Generator, optional): on the CPU. Defaults to ``None``, torch's own.
        """
        if not self._balanced:
            drawn = _integers(self.num_starts, count, generator)
        else:
            task = _integers(len(self._task_counts), count, generator)
            drawn = self._task_first[task] + _integers(_LARGE, count, generator) % self._task_counts[task]
        episode, offset = self._starts.locate(drawn)
        return self._first[episode] + offset

    def observation_rows(self, count: int, generator: torch.Generator | None = None) -> Ints:
        """Rows of ``count`` observations, int64 ``[count]``, uniform over all of the chosen episodes."""
        episode, offset = self._rows.locate(_integers(self._rows.total, count, generator))
        return self._first[episode] + offset


class _Ranges:
    """Ranges one after the other: which one a number falls into, and how far."""

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        self.ends = counts.cumsum()
        self.total = int(self.ends[-1]) if len(counts) else 0

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        # Right of equal ends: a range without a number is skipped.
        found = np.searchsorted(self.ends, numbers, side="right")
        return found, numbers - self.ends[found] + self.counts[found]


def _integers(below: int, count: int, generator: torch.Generator | None) -> Ints:
    return torch.randint(below, (count,), generator=generator).numpy()


def _check(store: EpisodeStore, horizon: int, tasks: Sequence[int] | None, counts: Ints) -> None:
    """Refuse tasks without a start."""
    for task in () if tasks is None else tasks:
        if not 0 <= task < len(counts):
            raise ConfigurationError(
                f"task index {task} is not in the episode store {store.path}, which has {len(counts)} tasks"
            )
        if not counts[task]:
            raise ConfigurationError(
                f"task {store.task_names[task]!r} has no episode of at least {horizon} transitions in the episode "
                f"store {store.path}; choose other tasks, a shorter algorithm.horizon, or import data of it"
            )
    if not counts.any():
        raise ConfigurationError(
            f"the episode store {store.path} has no episode of at least {horizon} transitions to draw from; choose a "
            "shorter algorithm.horizon or other data"
        )


def split_episodes(store: EpisodeStore, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Divide a store's episodes for training and validation, each task in the same proportion.

    The division depends on the store's table of episodes and the arguments only: no library's random numbers, which
    may change, decide it. Of a task with two or more episodes at least one goes to either side.

    Args:
        store (EpisodeStore): the store.
        fraction (float): share of validation, in (0, 1).
        seed (int): of the division.

    Returns:
        tuple of numpy.ndarray: numbers of the episodes for training and for validation, increasing.

    Raises:
        ConfigurationError: if ``fraction`` is not in (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigurationError(f"the share of validation {fraction} is not between 0 and 1")
    held_out = np.zeros(store.num_episodes, dtype=bool)
    order = _mixed(np.arange(store.num_episodes, dtype=np.uint64), seed)
    for task in range(len(store.task_names)):
        members = np.flatnonzero(store.task == task)
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out[members[np.argsort(order[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mixed(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Numbers that look random, a fixed function of each number and the seed: SplitMix64, twice."""
    state = np.full_like(numbers, seed & (1 << 64) - 1)
    for addend in (numbers, np.uint64(0)):
        state = state + addend + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
