"""What a store, or data that are still to be imported, hold of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pwm_torchrl.data.episodes.open_sources import open_sources
from pwm_torchrl.data.episodes.progress import ByteProgress
from pwm_torchrl.data.episodes.rows import BadEpisodes, EpisodeRows, used_widths
from pwm_torchrl.data.episodes.shifts import UNKNOWN, Episode, Shift, find_action_shift, find_reward_shift
from pwm_torchrl.data.episodes.store import EpisodeStore
from pwm_torchrl.data.episodes.writer import QUANTILES

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["Inspection", "TaskReport", "inspect_source", "inspect_store"]

#: Episodes of a task whose rows are looked at, and rows of each.
_SAMPLED_EPISODES = 24
_SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class TaskReport:
    """One task's data.

    Attributes:
        name (str): of the task.
        episodes (int): how many.
        transitions (int): of all of them.
        lengths (tuple of int): transitions of the shortest and the longest episode.
        return_quantiles (tuple of float): lowest, quartiles and highest return.
        observation_used (int): columns of observations in use, of ``observation_dim``.
        observation_dim (int): O of the task.
        action_used (int): columns of actions in use, of ``action_dim``.
        action_dim (int): A of the task.
        action_shift (Shift): whether actions lie in their rows.
        reward_shift (Shift): whether rewards do.
    """

    name: str
    episodes: int
    transitions: int
    lengths: tuple[int, int]
    return_quantiles: tuple[float, ...]
    observation_used: int
    observation_dim: int
    action_used: int
    action_dim: int
    action_shift: Shift
    reward_shift: Shift


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        tasks (tuple of TaskReport): of the tasks that have data.
        absent (tuple of str): names of those that have none.
        problems (dict): what is wrong with a source, by its name.
    """

    tasks: tuple[TaskReport, ...]
    absent: tuple[str, ...]
    problems: dict[str, str]


@dataclass
class _Collected:
    """What is kept of one task while data pass by."""

    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    observation_used: int = 0
    action_used: int = 0
    sample: list[Episode] = field(default_factory=list)


def inspect_store(store: EpisodeStore | str | Path) -> Inspection:
    """Summary of a store; columns in use and shifts are told from some episodes of each task.

    Args:
        store (EpisodeStore, str or Path): the store.

    Raises:
        ConfigurationError: if it cannot be opened.
    """
    store = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
    reports, absent = [], []
    for task, name in enumerate(store.task_names):
        members = np.flatnonzero(store.task == task)
        if not len(members):
            absent.append(name)
            continue
        chosen = members[np.unique(np.linspace(0, len(members) - 1, _SAMPLED_EPISODES).astype(np.int64))]
        collected = _Collected(store.length[members].tolist(), store.returns(members).tolist())
        for episode in chosen:
            _look(collected, store.episode_rows(int(episode), _SAMPLED_ROWS))
        reports.append(_report(collected, name, store.observation_dims[task], store.action_dims[task]))
    return Inspection(tuple(reports), tuple(absent), {})


def inspect_source(
    sources: str | Path | Sequence[str | Path], tasks: TaskSet, *, task: str | None = None, progress: bool = False
) -> Inspection:
    """Summary of data that are still to be imported; all of them are read and checked as for an import.

    Args:
        sources (str, Path or sequence of them): as for :func:`~pwm_torchrl.data.episodes.import_episodes`.
        tasks (TaskSet): the tasks that the data number or name.

    Keyword Args:
        task (str, optional): name of the task of episodes that name none. Defaults to ``None``.
        progress (bool): show it on stderr. Defaults to ``False``.

    Raises:
        ConfigurationError: if a source is not there.
        MissingLibraryError: if a library that reads one is not installed.
    """
    given = open_sources([sources] if isinstance(sources, (str, Path)) else list(sources), task)
    found: dict[int, _Collected] = {}
    problems: dict[str, str] = {}
    chance = np.random.RandomState(0)
    with ByteProgress(sum(source.size for source in given), progress) as shown:
        for source in given:
            shown.describe(source.name)
            try:
                source.check(tasks)
                for rows in source.blocks(tasks):
                    _collect(found, rows, tasks, chance)
            except BadEpisodes as bad:
                problems[source.name] = str(bad)
                shown.say(f"{source.name}: {bad}")
            shown.advance(source.size)
    reports = [
        _report(collected, tasks.names[index], tasks.observation_dims[index], tasks.action_dims[index])
        for index, collected in sorted(found.items())
    ]
    absent = tuple(name for index, name in enumerate(tasks.names) if index not in found)
    return Inspection(tuple(reports), absent, problems)


def _collect(found: dict[int, _Collected], rows: EpisodeRows, tasks: TaskSet, chance: np.random.RandomState) -> None:
    """Count a block's episodes, and keep some, all with the same probability."""
    observation_used, action_used = used_widths(rows)
    for number, (first, value) in enumerate(zip(rows.first, rows.returns())):
        index, length = int(rows.task[number]), int(rows.length[number])
        collected = found.setdefault(index, _Collected())
        collected.lengths.append(length)
        collected.returns.append(float(value))
        collected.observation_used = max(collected.observation_used, int(observation_used[number]))
        collected.action_used = max(collected.action_used, int(action_used[number]))
        place = len(collected.sample)
        if place >= _SAMPLED_EPISODES:
            place = chance.randint(len(collected.lengths))
        if place < _SAMPLED_EPISODES:
            part = slice(first, first + min(length + 1, _SAMPLED_ROWS))
            o, a = tasks.observation_dims[index], tasks.action_dims[index]
            # Copies: a block is let go.
            kept = Episode(rows.observation[part, :o].copy(), rows.action[part, :a].copy(), rows.reward[part].copy())
            collected.sample[place : place + 1] = [kept]


def _look(collected: _Collected, rows: EpisodeRows) -> None:
    observation_used, action_used = used_widths(rows)
    collected.observation_used = max(collected.observation_used, int(observation_used[0]))
    collected.action_used = max(collected.action_used, int(action_used[0]))
    collected.sample.append(Episode(rows.observation, rows.action, rows.reward))


def _report(collected: _Collected, name: str, observation_dim: int, action_dim: int) -> TaskReport:
    action = find_action_shift(collected.sample)
    quantiles = np.quantile(collected.returns, QUANTILES)
    return TaskReport(
        name=name,
        episodes=len(collected.lengths),
        transitions=sum(collected.lengths),
        lengths=(min(collected.lengths), max(collected.lengths)),
        return_quantiles=tuple(float(value) for value in quantiles),
        observation_used=collected.observation_used,
        observation_dim=observation_dim,
        action_used=collected.action_used,
        action_dim=action_dim,
        action_shift=action,
        reward_shift=find_reward_shift(collected.sample, action),
    )


def describe_shifts(report: TaskReport) -> list[str]:
    """Sentences on one task's shifts, the bad ones plain."""
    found = []
    for what, shift in (("actions", report.action_shift), ("rewards", report.reward_shift)):
        if shift.verdict == UNKNOWN:
            found.append(f"{report.name}: cannot tell whether {what} are shifted: {shift.reason}")
        elif shift.verdict != "aligned":
            found.append(f"{report.name}: {what} are shifted: they lie one row too {shift.verdict}; {shift.reason}")
    return found
