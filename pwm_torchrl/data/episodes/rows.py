"""Episodes on their way into a store, and what must hold of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["BadEpisodes", "EpisodeRows", "check_rows"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: How far an action may lie outside [−1, 1]: rounding, no more.
ACTION_TOLERANCE = 1e-4


class BadEpisodes(ValueError):
    """Source data that cannot go into a store; the message says what is wrong with them."""


@dataclass
class EpisodeRows:
    """Whole episodes, one row per observation, as a store holds them.

    Attributes:
        observation (numpy.ndarray): float32 ``[rows, O]``, padded with zeros to the widest task.
        action (numpy.ndarray): float32 ``[rows, A]``, padded likewise; filler in first rows.
        reward (numpy.ndarray): float32 ``[rows]``; filler in first rows.
        length (numpy.ndarray): transitions of each episode, int64 ``[E]``.
        task (numpy.ndarray): index of each episode's task, int64 ``[E]``.
        terminated (numpy.ndarray, optional): whether each episode ended by termination, bool ``[E]``. Defaults to
            ``None``: none did.
    """

    observation: Floats
    action: Floats
    reward: Floats
    length: Ints
    task: Ints
    terminated: npt.NDArray[np.bool_] | None = None

    @property
    def first(self) -> Ints:
        """First row of each episode."""
        return np.cumsum(self.length + 1) - self.length - 1

    def returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted return of each episode; first rows must be zero."""
        return np.add.reduceat(self.reward.astype(np.float64), self.first) if len(self.length) else np.empty(0)


def check_rows(rows: EpisodeRows, tasks: TaskSet, first_episode: int | None = None, *, labels: bool = True) -> None:
    """Compare episodes with the registry, and zero the filler of their first rows.

    Args:
        rows (EpisodeRows): the episodes.
        tasks (TaskSet): the set whose indices they use.
        first_episode (int, optional): number of the first in its file, for messages. Defaults to ``None``: there is
            one, and messages need not say which.

    Keyword Args:
        labels (bool): compare the columns in use with the labels; off for episodes that come with their own widths.
            Defaults to ``True``.

    Raises:
        BadEpisodes: for task indices out of range, values that are not finite, actions outside [−1, 1] and dimensions
            that disagree with the registry.
    """
    wrong = np.flatnonzero((rows.task < 0) | (rows.task >= len(tasks)))
    if len(wrong):
        raise BadEpisodes(
            f"{_label(first_episode, wrong[0])}task index {rows.task[wrong[0]]}, but the task set {tasks.name} "
            f"numbers its tasks 0 to {len(tasks) - 1}"
        )
    first = rows.first
    rows.action[first], rows.reward[first] = 0.0, 0.0
    for name, values in (("observation", rows.observation), ("action", rows.action), ("reward", rows.reward)):
        _check_finite(name, values, rows, first_episode)
    extreme = np.abs(rows.action).max(1, initial=0.0)
    if (extreme > 1 + ACTION_TOLERANCE).any():
        episode, step = _place(rows, int(extreme.argmax()))
        raise BadEpisodes(
            f"{_label(first_episode, episode)}action of size {extreme.max():.4g} at index {step}; actions must lie in "
            "[-1, 1]"
        )
    if labels:
        _check_dimensions(rows, tasks, first_episode)


def _check_finite(name: str, values: Floats, rows: EpisodeRows, first_episode: int | None) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite if finite.ndim == 1 else finite.all(1)))
        episode, step = _place(rows, row)
        raise BadEpisodes(f"{_label(first_episode, episode)}{name} is not finite at index {step}")


def _label(first_episode: int | None, episode: int) -> str:
    return "" if first_episode is None else f"episode {first_episode + episode}: "


def _place(rows: EpisodeRows, row: int) -> tuple[int, int]:
    """Episode of a row, and which of its rows it is."""
    first = rows.first
    episode = int(np.searchsorted(first, row, side="right")) - 1
    return episode, row - int(first[episode])


def _check_dimensions(rows: EpisodeRows, tasks: TaskSet, first_episode: int | None) -> None:
    """Columns beyond a task's own are padding and must be zero; those within should be in use.

    A feature may rest at zero for a whole episode (a touch sensor, a goal's height), so a label is only called wrong
    from that side if a quarter of the observation or a column of the action at its end was never used.
    """
    observation_used, action_used = used_widths(rows)
    observation_dims, action_dims = (np.asarray(d) for d in (tasks.observation_dims, tasks.action_dims))
    o, a = observation_dims[rows.task], action_dims[rows.task]
    for name, used, dims, unused in (
        ("observation", observation_used, o, 4 * observation_used <= 3 * o),
        ("action", action_used, a, (action_used > 0) & (action_used < a)),
    ):
        wrong = np.flatnonzero((used > dims) | unused)
        if len(wrong):
            episode = int(wrong[0])
            more = f", and {len(wrong) - 1} more episodes" if len(wrong) > 1 else ""
            raise BadEpisodes(
                f"{_label(first_episode, episode)}labelled task {tasks.names[rows.task[episode]]!r}, but its "
                f"{name}s use {used[episode]} dimensions where the registry says {dims[episode]}: wrong task index, or "
                f"dimensions that disagree with the registry{more}"
            )


def used_widths(rows: EpisodeRows) -> tuple[Ints, Ints]:
    """Columns of observations and actions up to the last that is not zero throughout an episode, int64 ``[E]`` each."""
    return _used(rows.observation, rows.first), _used(rows.action, rows.first)


def _used(values: Floats, first: Ints) -> Ints:
    nonzero = np.logical_or.reduceat(values != 0, first, axis=0)
    return np.where(nonzero.any(1), values.shape[1] - nonzero[:, ::-1].argmax(1), 0).astype(np.int64)
