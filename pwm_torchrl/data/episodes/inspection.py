"""What is in a store of episodes, and whether rewards or actions are shifted against observations.

*Actions.* The change of the observation over a transition is regressed on the observation before it and the actions of
three neighbouring rows. Leaving out the action that caused the change makes the held-out error larger; leaving out
another does not. There is one exception: the action after the transition was chosen by a policy that saw its result,
and so tells something of it. Where such a leak may be all there is, nothing is claimed.

*Rewards.* The reward of a row is predicted from the observation of that row and of its neighbours; where it depends on
actions too, those tell which transition it belongs to. Rewards that change slowly, or rarely, tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pwm_torchrl.data.episodes.importing import open_sources
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows, EpisodeStore, used_widths
from pwm_torchrl.data.episodes.writer import QUANTILES, ByteProgress

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "Episode",
    "Inspection",
    "Shift",
    "TaskReport",
    "find_action_shift",
    "find_reward_shift",
    "inspect_source",
    "inspect_store",
]

# Whether actions and rewards lie in the rows where they belong, told from the data ------------------------------------


Array = npt.NDArray[np.float64]

ALIGNED, EARLY, LATE, UNKNOWN = "aligned", "early", "late", "unknown"
_LAGS = (-1, 0, 1)
#: Place of row t in a window of rows t − 2 to t + 1.
_NOW = 2
#: Share of the held-out error that a column must take away to count as a cause.
_GAIN = 0.1
#: The error with the right row's observation is below this share of the error with any other's.
_DISTINCT = 0.75
_NEIGHBOURS = 3
_MOST_NEIGHBOURS = 3000
_FEWEST_ROWS = 200
_MOST_ROWS = 6000
#: Rows are fitted to and held out in turns, in blocks: both halves have seen every phase of every episode.
_BLOCK_ROWS = 20
_FEATURES = 160
_RIDGES = (1e-5, 1e-3, 1e-1)


@dataclass
class Episode:
    """Rows of one episode as a store holds them, without padding.

    Attributes:
        observation (numpy.ndarray): ``[L + 1, O]``.
        action (numpy.ndarray): ``[L + 1, A]``, that of row t led to row t.
        reward (numpy.ndarray): ``[L + 1]``.
    """

    observation: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reward: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """What was found.

    Attributes:
        verdict (str): ``"aligned"``; ``"late"``: values are stored one row after the one where they belong;
            ``"early"``: one row before it; ``"unknown"``: the data do not tell.
        reason (str): why.
    """

    verdict: str
    reason: str


def find_action_shift(episodes: Sequence[Episode]) -> Shift:
    """Whether actions are stored one row early or late.

    Args:
        episodes (sequence of Episode): of one task.
    """
    windows = _Windows.of(episodes)
    if windows is None:
        return Shift(UNKNOWN, "there are too few transitions")
    if windows.action.std((0, 1)).max() < 1e-6:
        return Shift(UNKNOWN, "actions never vary")
    gains = _gains(
        windows, windows.scaled[:, _NOW - 1], windows.observation[:, _NOW] - windows.observation[:, _NOW - 1]
    )
    shown = "gains of the rows before, at and after: " + ", ".join(f"{gains[lag]:.2f}" for lag in _LAGS)
    causes = [lag for lag in _LAGS if gains[lag] >= max(_GAIN, 0.2 * max(gains.values()))]
    if causes == [0]:
        return Shift(ALIGNED, shown)
    if causes == [-1]:
        return Shift(EARLY, shown)
    if causes == [1]:
        if _reacts(windows, 1):
            return Shift(UNKNOWN, f"the policy's reactions may explain it ({shown})")
        return Shift(LATE, shown)
    # Two rows tell something: one caused the change. The other came after it and reacts, or came before it and still
    # acts, where observations do not hold the whole state.
    if causes == [0, 1]:
        if gains[0] >= 2 * gains[1] or _reacts(windows, 1):
            return Shift(ALIGNED, shown)
        if gains[1] > gains[0]:
            return Shift(LATE, shown)
    if causes == [-1, 0]:
        if gains[-1] >= 2 * gains[0] or (gains[-1] > gains[0] and _reacts(windows, 0)):
            return Shift(EARLY, shown)
        if gains[0] > gains[-1] and not _reacts(windows, 0):
            return Shift(ALIGNED, shown)
    return Shift(UNKNOWN, f"no row's action stands out ({shown})")


def find_reward_shift(episodes: Sequence[Episode], action: Shift) -> Shift:
    """Whether rewards are stored one row early or late.

    Args:
        episodes (sequence of Episode): of one task.
        action (Shift): what :func:`find_action_shift` found for them.
    """
    windows = _Windows.of(episodes)
    if windows is None:
        return Shift(UNKNOWN, "there are too few transitions")
    if not _varies(windows):
        return Shift(UNKNOWN, "rewards hardly ever vary")
    found = min((_smooth_errors(windows), _local_errors(windows)), key=_distinctness)
    best = min(_LAGS, key=lambda lag: found[lag])
    shown = "errors with the observation before, at and after: " + ", ".join(f"{found[lag]:.3f}" for lag in _LAGS)
    if found[best] > 0.85 or _distinctness(found) > _DISTINCT:
        return Shift(UNKNOWN, f"no row's observation stands out ({shown})")
    by_action = _reward_by_action(windows, action, best)
    if by_action is not None:
        return by_action
    if best == -1:
        return Shift(LATE, f"or the environment rewards the state before the transition ({shown})")
    return Shift(ALIGNED if best == 0 else EARLY, shown)


def _varies(windows: _Windows) -> bool:
    """Whether enough rewards of both halves differ from the usual one."""
    reward = windows.reward[:, _NOW]
    unusual = np.abs(reward - np.median(reward)) > 1e-6 + 1e-3 * reward.std()
    return all(unusual[half].mean() >= 0.02 for half in (windows.training, ~windows.training))


def _distinctness(errors: dict[int, float]) -> float:
    """Smallest error as a share of the next."""
    best, second, _ = sorted(errors.values())
    return best / max(second, 1e-12)


def _smooth_errors(windows: _Windows) -> dict[int, float]:
    """Errors of a smooth fit, of differences between rows: what it misses changes slowly, and would hide where the
    rewards lie.
    """
    target = (windows.reward[:, _NOW] - windows.reward[:, _NOW - 1])[:, None]
    variance = float(target[~windows.training].var())
    squares = [_squares(windows.action[:, row]) for row in range(4)]
    actions = [squares[row] - squares[row - 1] for row in (1, 2, 3)]
    waves = [_nonlinear(windows.scaled[:, row]) for row in range(4)]
    errors = {}
    for lag in _LAGS:
        features = np.concatenate([waves[_NOW + lag] - waves[_NOW + lag - 1], *actions], 1)
        errors[lag] = float(_held_out_error(features, target, windows.training)[0]) / max(variance, 1e-12)
    return errors


def _local_errors(windows: _Windows) -> dict[int, float]:
    """Errors of the mean of the nearest neighbours, for rewards that jump."""
    fitted, held_out = (np.flatnonzero(half) for half in (windows.training, ~windows.training))
    fitted, held_out = (rows[_spread(len(rows), _MOST_NEIGHBOURS)] for rows in (fitted, held_out))
    reward = windows.reward[:, _NOW]
    variance = float(reward[held_out].var())
    errors = {}
    for lag in _LAGS:
        state = windows.scaled[:, _NOW + lag]
        x, y = state[fitted], state[held_out]
        distance = (x**2).sum(1) - 2 * y @ x.T  # less what is the same for all of a row
        nearest = np.argpartition(distance, _NEIGHBOURS, 1)[:, :_NEIGHBOURS]
        errors[lag] = float(((reward[fitted][nearest].mean(1) - reward[held_out]) ** 2).mean()) / max(variance, 1e-12)
    return errors


def _reward_by_action(windows: _Windows, action: Shift, observed: int) -> Shift | None:
    """From the action that the reward depends on beside one row's observation; ``None`` where it depends on none."""
    if action.verdict == UNKNOWN or windows.action.std((0, 1)).max() < 1e-6:
        return None
    gains = _gains(windows, windows.scaled[:, _NOW + observed], windows.reward[:, [_NOW]])
    best, second = sorted(_LAGS, key=lambda lag: -gains[lag])[:2]
    if gains[best] < 2 * _GAIN or gains[second] > 0.25 * gains[best]:
        return None
    # Row t's reward goes with the action of row t + best, which caused the transition into row t + offset.
    offset = best - {ALIGNED: 0, LATE: 1, EARLY: -1}[action.verdict]
    verdict = {0: ALIGNED, -1: LATE, 1: EARLY}.get(offset)
    shown = f"it depends on the action of row {best:+d}, by {gains[best]:.2f}"
    return None if verdict is None else Shift(verdict, shown)


@dataclass
class _Windows:
    """Rows t − 2 to t + 1 around the transitions into row t, ``[N, 4, ...]``; a half of them to train on."""

    observation: Array
    scaled: Array
    action: Array
    reward: Array
    training: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> _Windows | None:
        observation, action, reward, training = [], [], [], []
        for episode in episodes:
            # Row 0 holds no action and no reward; the last has no row after it.
            rows = np.arange(3, len(episode.reward) - 1)
            around = rows[:, None] + np.arange(-2, 2)
            observation.append(episode.observation[around])
            action.append(episode.action[around])
            reward.append(episode.reward[around])
            half = rows // _BLOCK_ROWS % 2 == 0
            training.append(half)
        if not training or min(sum(half.sum() for half in training), sum((~half).sum() for half in training)) < (
            _FEWEST_ROWS // 2
        ):
            return None
        chosen = _spread(sum(map(len, training)), 2 * _MOST_ROWS)
        o, a, r = (np.concatenate(x)[chosen].astype(np.float64) for x in (observation, action, reward))
        spread = o.std((0, 1))
        o = o[:, :, spread > 1e-6]
        scaled = (o - o.mean((0, 1))) / np.maximum(o.std((0, 1)), 1e-6)
        return cls(o, scaled, a, r, np.concatenate(training)[chosen])


def _spread(count: int, most: int) -> npt.NDArray[np.int64]:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _gains(windows: _Windows, state: Array, target: Array) -> dict[int, float]:
    """By how much each row's action lowers the held-out error when the other rows' are known: the share, of the target
    where it is largest.
    """
    if not windows.observation.shape[2]:
        return dict.fromkeys(_LAGS, 0.0)
    base = _nonlinear(state)
    actions = {}
    for lag in _LAGS:
        action = windows.action[:, _NOW + lag]
        products = (action[:, :, None] * state[:, None, :]).reshape(len(action), -1)
        actions[lag] = np.concatenate([action, action**2, products], 1)
    whole = _held_out_error(np.concatenate([base, *actions.values()], 1), target, windows.training)
    variance = target[~windows.training].var(0)
    # What is predicted to the last digit either way has nothing to tell.
    floor = 1e-6 * variance + 1e-15
    gains = {}
    for lag in _LAGS:
        rest = [values for other, values in actions.items() if other != lag]
        without = _held_out_error(np.concatenate([base, *rest], 1), target, windows.training)
        gains[lag] = float((1 - (whole + floor) / (without + floor)).max())
    return gains


def _reacts(windows: _Windows, lag: int) -> bool:
    """Whether the action of row t + lag rather was chosen after seeing row t than caused the change into it: then the
    row before adds nothing to what row t tells of it.
    """
    action = windows.action[:, _NOW + lag]
    variance = np.maximum(action[~windows.training].var(0), 1e-9)
    before, after = (_nonlinear(windows.scaled[:, row]) for row in (_NOW - 1, _NOW))
    change = windows.scaled[:, _NOW] - windows.scaled[:, _NOW - 1]
    alone, both = (
        float((_held_out_error(features, action, windows.training) / variance).mean())
        for features in (after, np.concatenate([after, before, change], 1))
    )
    return alone < 0.9 and both > 0.8 * alone


def _squares(action: Array) -> Array:
    return np.concatenate([action, action**2], 1)


def _nonlinear(state: Array) -> Array:
    """The state and random waves of it, of two lengths."""
    generator = np.random.RandomState(0)
    width = max(1, state.shape[1])
    half = _FEATURES // 2
    scale = np.repeat([0.5, 1.5], half) / np.sqrt(width)
    waves = state @ (generator.randn(state.shape[1], 2 * half) * scale) + generator.uniform(0, 2 * np.pi, 2 * half)
    return np.concatenate([state, np.cos(waves)], 1)


def _held_out_error(features: Array, target: Array, training: npt.NDArray[np.bool_]) -> Array:
    """Mean squared error of ridge regression on the rows that it was not fitted to, per column of the target: the
    smallest of several penalties, the same ones for whatever is compared.
    """
    mean, spread = features[training].mean(0), features[training].std(0)
    # Clipped: what was hardly seen in training must not be extrapolated from.
    scaled = np.clip(np.where(spread > 1e-9, (features - mean) / np.maximum(spread, 1e-9), 0.0), -10, 10)
    center = target[training].mean(0)
    x, y = scaled[training], target[training] - center
    gram, moments = x.T @ x, x.T @ y
    errors = []
    for ridge in _RIDGES:
        weights = np.linalg.solve(gram + ridge * len(x) * np.eye(len(gram)), moments)
        errors.append(((scaled[~training] @ weights + center - target[~training]) ** 2).mean(0))
    return np.min(errors, 0)


# What a store, or data that are still to be imported, hold of each task -----------------------------------------------


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
