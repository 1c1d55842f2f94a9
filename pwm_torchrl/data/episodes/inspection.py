"""Summary of an episode store, and detection of actions or rewards that are shifted against the observations.

*Actions.* The change of the observation in a transition is regressed on the observation before it and the actions of
three adjacent rows. Leaving out the action that caused the change increases the held-out error; leaving out another one
does not. The exception is the action after the transition: a policy chose it after seeing the result, so it carries
information about the result. If such a leak could be the only effect, the verdict is "unknown".

*Rewards.* The reward of a row is predicted from the observation of that row and from those of adjacent rows. If it also
depends on actions, they show which transition it belongs to. Rewards that change slowly or rarely give no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pwm_torchrl.data.episodes.importing import open_sources
from pwm_torchrl.data.episodes.index import evenly_spaced
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows, EpisodeStore, used_widths
from pwm_torchrl.data.episodes.writer import QUANTILES, ByteProgress

if TYPE_CHECKING:
    from pwm_torchrl.data.episodes.sources import Source
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

# Detection of shifted actions and rewards -----------------------------------------------------------------------------


Array = npt.NDArray[np.float64]

ALIGNED, EARLY, LATE, UNKNOWN = "aligned", "early", "late", "unknown"
_LAGS = (-1, 0, 1)
#: Index of row t in a window of rows t − 2 to t + 1.
_NOW = 2
#: Fraction by which an action must reduce the held-out error to count as a cause.
_GAIN = 0.1
#: The error with the right row's observation must be below this fraction of the error with any other row's.
_DISTINCT = 0.75
_NEIGHBOURS = 3
_MOST_NEIGHBOURS = 3000
_FEWEST_ROWS = 200
_MOST_ROWS = 6000
#: Blocks of rows are alternately fitted and held out, so that both halves cover all phases of the episodes.
_BLOCK_ROWS = 20
_FEATURES = 160
_RIDGES = (1e-5, 1e-3, 1e-1)


@dataclass
class Episode:
    """Rows of one episode in the layout of a store, without padding.

    Attributes:
        observation (numpy.ndarray): ``[L + 1, O]``.
        action (numpy.ndarray): ``[L + 1, A]``; the action of row t led to row t.
        reward (numpy.ndarray): ``[L + 1]``.
    """

    observation: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reward: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """Result of a shift detection.

    Attributes:
        verdict (str): ``"aligned"``; ``"late"``: values are stored one row too late; ``"early"``: one row too early;
            ``"unknown"``: the data give no answer.
        reason (str): the measured values behind the verdict.
    """

    verdict: str
    reason: str


def find_action_shift(episodes: Sequence[Episode]) -> Shift:
    """Detect whether actions are stored one row early or late.

    Args:
        episodes (sequence of Episode): episodes of one task.
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
    # Two rows are informative. One caused the change; the other is a reaction to it, or an earlier action that still
    # has an effect because observations do not contain the whole state.
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
    """Detect whether rewards are stored one row early or late.

    Args:
        episodes (sequence of Episode): episodes of one task.
        action (Shift): the result of :func:`find_action_shift` for them.
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
    """Whether enough rewards differ from the median, in both halves."""
    reward = windows.reward[:, _NOW]
    unusual = np.abs(reward - np.median(reward)) > 1e-6 + 1e-3 * reward.std()
    return all(unusual[half].mean() >= 0.02 for half in (windows.training, ~windows.training))


def _distinctness(errors: dict[int, float]) -> float:
    """Smallest error divided by the second smallest."""
    best, second, _ = sorted(errors.values())
    return best / max(second, 1e-12)


def _smooth_errors(windows: _Windows) -> dict[int, float]:
    """Errors of a smooth fit to differences between rows; slowly varying residuals would hide the alignment."""
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
    """Errors of a nearest-neighbour prediction, for discontinuous rewards."""
    fitted, held_out = (np.flatnonzero(half) for half in (windows.training, ~windows.training))
    fitted, held_out = (rows[evenly_spaced(len(rows), _MOST_NEIGHBOURS)] for rows in (fitted, held_out))
    reward = windows.reward[:, _NOW]
    variance = float(reward[held_out].var())
    errors = {}
    for lag in _LAGS:
        state = windows.scaled[:, _NOW + lag]
        x, y = state[fitted], state[held_out]
        distance = (x**2).sum(1) - 2 * y @ x.T  # up to a constant per row
        nearest = np.argpartition(distance, _NEIGHBOURS, 1)[:, :_NEIGHBOURS]
        errors[lag] = float(((reward[fitted][nearest].mean(1) - reward[held_out]) ** 2).mean()) / max(variance, 1e-12)
    return errors


def _reward_by_action(windows: _Windows, action: Shift, observed: int) -> Shift | None:
    """Shift derived from the action that the reward depends on, in addition to a row's observation.

    Returns ``None`` if the reward depends on no action.
    """
    if action.verdict == UNKNOWN or windows.action.std((0, 1)).max() < 1e-6:
        return None
    gains = _gains(windows, windows.scaled[:, _NOW + observed], windows.reward[:, [_NOW]])
    best, second = sorted(_LAGS, key=lambda lag: -gains[lag])[:2]
    if gains[best] < 2 * _GAIN or gains[second] > 0.25 * gains[best]:
        return None
    # Row t's reward belongs to the action of row t + best, which caused the transition into row t + offset.
    offset = best - {ALIGNED: 0, LATE: 1, EARLY: -1}[action.verdict]
    verdict = {0: ALIGNED, -1: LATE, 1: EARLY}.get(offset)
    shown = f"it depends on the action of row {best:+d}, by {gains[best]:.2f}"
    return None if verdict is None else Shift(verdict, shown)


@dataclass
class _Windows:
    """Rows t − 2 to t + 1 around the transitions into row t, ``[N, 4, ...]``, with a mask of the training half."""

    observation: Array
    scaled: Array
    action: Array
    reward: Array
    training: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> _Windows | None:
        observation, action, reward, training = [], [], [], []
        for episode in episodes:
            # Row 0 has no action and no reward, and the last row has no successor.
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
        chosen = evenly_spaced(sum(map(len, training)), 2 * _MOST_ROWS)
        o, a, r = (np.concatenate(x)[chosen].astype(np.float64) for x in (observation, action, reward))
        spread = o.std((0, 1))
        o = o[:, :, spread > 1e-6]
        scaled = (o - o.mean((0, 1))) / np.maximum(o.std((0, 1)), 1e-6)
        return cls(o, scaled, a, r, np.concatenate(training)[chosen])


def _gains(windows: _Windows, state: Array, target: Array) -> dict[int, float]:
    """Fraction by which each row's action reduces the held-out error, given the actions of the other rows.

    The maximum over the columns of the target.
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
    # Avoid ratios of rounding errors where both predictions are exact.
    floor = 1e-6 * variance + 1e-15
    gains = {}
    for lag in _LAGS:
        rest = [values for other, values in actions.items() if other != lag]
        without = _held_out_error(np.concatenate([base, *rest], 1), target, windows.training)
        gains[lag] = float((1 - (whole + floor) / (without + floor)).max())
    return gains


def _reacts(windows: _Windows, lag: int) -> bool:
    """Whether the action of row t + lag is a reaction to row t, rather than the cause of the change into it.

    If it is a reaction, row t alone predicts it as well as row t together with the row before.
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
    """The state and random Fourier features of it at two scales."""
    generator = np.random.RandomState(0)
    width = max(1, state.shape[1])
    half = _FEATURES // 2
    scale = np.repeat([0.5, 1.5], half) / np.sqrt(width)
    waves = state @ (generator.randn(state.shape[1], 2 * half) * scale) + generator.uniform(0, 2 * np.pi, 2 * half)
    return np.concatenate([state, np.cos(waves)], 1)


def _held_out_error(features: Array, target: Array, training: npt.NDArray[np.bool_]) -> Array:
    """Mean squared error of ridge regression on the held-out rows, per column of the target.

    The minimum over a fixed set of penalties.
    """
    mean, spread = features[training].mean(0), features[training].std(0)
    # Clipped, so that rare values are not extrapolated.
    scaled = np.clip(np.where(spread > 1e-9, (features - mean) / np.maximum(spread, 1e-9), 0.0), -10, 10)
    center = target[training].mean(0)
    x, y = scaled[training], target[training] - center
    gram, moments = x.T @ x, x.T @ y
    errors = []
    for ridge in _RIDGES:
        weights = np.linalg.solve(gram + ridge * len(x) * np.eye(len(gram)), moments)
        errors.append(((scaled[~training] @ weights + center - target[~training]) ** 2).mean(0))
    return np.min(errors, 0)


# Summary of each task -------------------------------------------------------------------------------------------------


#: Maximum number of episodes per task whose rows are examined, and of rows per episode.
_SAMPLED_EPISODES = 24
_SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class TaskReport:
    """Summary of one task's data.

    Attributes:
        name (str): name of the task.
        episodes (int): number of episodes.
        transitions (int): total number of transitions.
        lengths (tuple of int): transitions of the shortest and the longest episode.
        return_quantiles (tuple of float): lowest, quartiles and highest return.
        observation_used (int): number of observation columns in use, of ``observation_dim``.
        observation_dim (int): O of the task.
        action_used (int): number of action columns in use, of ``action_dim``.
        action_dim (int): A of the task.
        action_shift (Shift): whether actions are shifted.
        reward_shift (Shift): whether rewards are shifted.
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
    """Summary of a store or of sources.

    Attributes:
        tasks (tuple of TaskReport): reports of the tasks with data.
        absent (tuple of str): names of the tasks without data.
        problems (dict): problem of each bad source, by the source's name.
    """

    tasks: tuple[TaskReport, ...]
    absent: tuple[str, ...]
    problems: dict[str, str]


@dataclass
class _Collected:
    """Statistics and sampled episodes of one task."""

    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    observation_used: int = 0
    action_used: int = 0
    sample: list[Episode] = field(default_factory=list)


def inspect_store(store: EpisodeStore | str | Path) -> Inspection:
    """Summarise a store; used columns and shifts are determined from a sample of each task's episodes.

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
        chosen = members[evenly_spaced(len(members), _SAMPLED_EPISODES)]
        collected = _Collected(store.length[members].tolist(), store.returns(members).tolist())
        for episode in chosen:
            _add_sample(collected, store.episode_rows(int(episode), _SAMPLED_ROWS))
        reports.append(_report(collected, name, store.observation_dims[task], store.action_dims[task]))
    return Inspection(tuple(reports), tuple(absent), {})


def inspect_source(
    sources: str | Path | Sequence[str | Path | Source],
    tasks: TaskSet,
    *,
    task: str | None = None,
    progress: bool = False,
) -> Inspection:
    """Summarise sources before an import; all data are read and checked as for an import.

    Args:
        sources (str, Path or sequence of them): as for :func:`~pwm_torchrl.data.episodes.import_episodes`.
        tasks (TaskSet): the task set of the data's indices or names.

    Keyword Args:
        task (str, optional): task name for episodes without one. Defaults to ``None``.
        progress (bool): show progress on stderr. Defaults to ``False``.

    Raises:
        ConfigurationError: if a source does not exist.
        MissingLibraryError: if a library for reading a source is not installed.
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
    """Add a block's statistics, and keep a uniform sample of its episodes (reservoir sampling)."""
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
            # Copies, so that the block can be freed.
            kept = Episode(rows.observation[part, :o].copy(), rows.action[part, :a].copy(), rows.reward[part].copy())
            collected.sample[place : place + 1] = [kept]


def _add_sample(collected: _Collected, rows: EpisodeRows) -> None:
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
    """One sentence for each shift of a task that is not aligned."""
    found = []
    for what, shift in (("actions", report.action_shift), ("rewards", report.reward_shift)):
        if shift.verdict == UNKNOWN:
            found.append(f"{report.name}: cannot determine whether {what} are shifted: {shift.reason}")
        elif shift.verdict != "aligned":
            found.append(f"{report.name}: {what} are stored one row too {shift.verdict}; {shift.reason}")
    return found
