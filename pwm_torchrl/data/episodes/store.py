"""Episode store: its layout on disk, checks of its rows, and reading slices from it.

A store is a folder of flat little-endian arrays with one row per *observation*. An episode of L transitions has L + 1
consecutive rows. The action and the reward of row t belong to the transition from row t − 1 to row t, so both are
filler (0) in the first row of an episode.

- ``observation.f32``: float32 ``[rows, O]``, padded with zeros to the widest task.
- ``action.f32``: float32 ``[rows, A]`` in [−1, 1], padded with zeros to the widest task.
- ``reward.f32``: float32 ``[rows]``.
- ``terminated.u8``, optional: uint8 ``[rows]``, 1 in the last row of an episode that ended by termination.
- ``episodes.npy``: int64 ``[E, 3]``: first row, transitions L, index of the task.
- ``returns.npy``: float64 ``[E]``, undiscounted returns.
- ``manifest.json``: contents, source files, and whether the import is finished.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "BadEpisodes",
    "EpisodeRows",
    "EpisodeStore",
    "check_rows",
]

# Files of an episode store, and its manifest --------------------------------------------------------------------------


FORMAT = "pwm_torchrl.episodes"
VERSION = 1
IMPORTING, FINISHED = "importing", "finished"

OBSERVATION, ACTION, REWARD, TERMINATED = "observation.f32", "action.f32", "reward.f32", "terminated.u8"
EPISODES, RETURNS, MANIFEST = "episodes.npy", "returns.npy", "manifest.json"


def bytes_per_row(observation_dim: int, action_dim: int) -> dict[str, int]:
    """Bytes per row in each file."""
    return {OBSERVATION: 4 * observation_dim, ACTION: 4 * action_dim, REWARD: 4, TERMINATED: 1}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a store, finished or not.

    Raises:
        ConfigurationError: if the folder is not a store, or has a newer version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"it has no {MANIFEST}" if path.is_dir() else "there is no such folder"
        raise ConfigurationError(
            f"{path} is not an episode store: {what}; make one with '{typed('data')} import SOURCE {path}'"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"the episode store {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not an episode store: its {MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigurationError(f"{path} is not an episode store: the format in its {MANIFEST} is not {FORMAT!r}")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise ConfigurationError(
            f"the episode store {path} has version {manifest.get('version')}; this installation reads up to {VERSION}: "
            "update it, or import the data again"
        )
    return manifest


def file_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Expected bytes of each data file."""
    widths = bytes_per_row(manifest["observation_dim"], manifest["action_dim"])
    rows = manifest["transitions"] + manifest["episodes"]
    return {name: rows * width for name, width in widths.items() if name != TERMINATED or manifest["has_terminated"]}


# Episodes to be written into a store, and their checks ----------------------------------------------------------------


Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: Tolerance for actions outside [−1, 1], for rounding errors.
ACTION_TOLERANCE = 1e-4


class BadEpisodes(ValueError):
    """Source data that cannot be imported; the message states the problem."""


@dataclass
class EpisodeRows:
    """Complete episodes with one row per observation, in the layout of a store.

    Attributes:
        observation (numpy.ndarray): float32 ``[rows, O]``, padded with zeros to the widest task.
        action (numpy.ndarray): float32 ``[rows, A]``, padded in the same way; filler in first rows.
        reward (numpy.ndarray): float32 ``[rows]``; filler in first rows.
        length (numpy.ndarray): transitions of each episode, int64 ``[E]``.
        task (numpy.ndarray): index of each episode's task, int64 ``[E]``.
        terminated (numpy.ndarray, optional): whether each episode ended by termination, bool ``[E]``. Defaults to
            ``None``, meaning that none did.
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
    """Check episodes against the task registry, and set the filler of their first rows to zero.

    Args:
        rows (EpisodeRows): the episodes.
        tasks (TaskSet): the task set of their indices.
        first_episode (int, optional): number of the first episode in its file, for messages. Defaults to ``None``,
            for a single episode that messages need not number.

    Keyword Args:
        labels (bool): whether to compare the columns in use with the task labels; off for episodes that were stored
            with their own widths. Defaults to ``True``.

    Raises:
        BadEpisodes: if a task index is out of range, a value is not finite, an action is outside [−1, 1], or the
            dimensions disagree with the registry.
    """
    wrong = np.flatnonzero((rows.task < 0) | (rows.task >= len(tasks)))
    if len(wrong):
        raise BadEpisodes(
            f"{_label(first_episode, wrong[0])}task index {rows.task[wrong[0]]} is not in the task set {tasks.name}, "
            f"which has the indices 0 to {len(tasks) - 1}"
        )
    first = rows.first
    rows.action[first], rows.reward[first] = 0.0, 0.0
    for name, values in (("observation", rows.observation), ("action", rows.action), ("reward", rows.reward)):
        _check_finite(name, values, rows, first_episode)
    extreme = np.abs(rows.action).max(1, initial=0.0)
    if (extreme > 1 + ACTION_TOLERANCE).any():
        episode, step = _locate(rows, int(extreme.argmax()))
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
        episode, step = _locate(rows, row)
        raise BadEpisodes(f"{_label(first_episode, episode)}{name} is not finite at index {step}")


def _label(first_episode: int | None, episode: int) -> str:
    return "" if first_episode is None else f"episode {first_episode + episode}: "


def _locate(rows: EpisodeRows, row: int) -> tuple[int, int]:
    """The episode of a row, and the row's index in it."""
    first = rows.first
    episode = int(np.searchsorted(first, row, side="right")) - 1
    return episode, row - int(first[episode])


def _check_dimensions(rows: EpisodeRows, tasks: TaskSet, first_episode: int | None) -> None:
    """Check the number of used columns: columns beyond a task's dimensions must be zero, those within should be in use.

    A feature may be zero for a whole episode (a touch sensor, a goal's height). Unused columns are therefore an error
    only if they are the last quarter of the observation or include the last column of the action.
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
                f"{name}s use {used[episode]} dimensions and the registry has {dims[episode]}: the task index or "
                f"the registry is wrong{more}"
            )


def used_widths(rows: EpisodeRows) -> tuple[Ints, Ints]:
    """Number of columns up to the last one that is not all zero, of observations and actions, int64 ``[E]`` each."""
    return _used(rows.observation, rows.first), _used(rows.action, rows.first)


def _used(values: Floats, first: Ints) -> Ints:
    nonzero = np.logical_or.reduceat(values != 0, first, axis=0)
    return np.where(nonzero.any(1), values.shape[1] - nonzero[:, ::-1].argmax(1), 0).astype(np.int64)


# Reading an episode store ---------------------------------------------------------------------------------------------


class EpisodeStore:
    """Read-only episodes of many tasks in memory-mapped files, see :mod:`~pwm_torchrl.data.episodes.store`.

    Use :meth:`open` to create one. Only the episode table is in memory (32 bytes per episode); reading touches only the
    rows that are returned.

    Attributes:
        path (Path): the folder.
        manifest (dict): ``manifest.json``.
        task_names (tuple of str): names, in the order of the tasks' indices.
        observation_dim (int): O, the width of the widest task.
        action_dim (int): ``A``.
        observation_dims (tuple of int): O of every task.
        action_dims (tuple of int): A of every task.
        num_episodes (int): ``E``.
        num_transitions (int): transitions of all episodes.
        first_row (numpy.ndarray): first row of every episode, int64 ``[E]``, increasing.
        length (numpy.ndarray): transitions of every episode, int64 ``[E]``.
        task (numpy.ndarray): index of every episode's task, int64 ``[E]``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        tasks = manifest["tasks"]
        self.task_names: tuple[str, ...] = tuple(task["name"] for task in tasks)
        self.observation_dims: tuple[int, ...] = tuple(task["observation_dim"] for task in tasks)
        self.action_dims: tuple[int, ...] = tuple(task["action_dim"] for task in tasks)
        self.observation_dim: int = manifest["observation_dim"]
        self.action_dim: int = manifest["action_dim"]
        self.num_episodes: int = manifest["episodes"]
        self.num_transitions: int = manifest["transitions"]
        table = _table(path / EPISODES, (self.num_episodes, 3))
        self.first_row, self.length, self.task = (np.ascontiguousarray(column) for column in table.T)
        self._returns = _table(path / RETURNS, (self.num_episodes,))
        rows = self.num_rows = self.num_transitions + self.num_episodes
        self._files = {name: _mapped(path / name) for name, size in file_sizes(manifest).items() if size}
        self._observation = self._array(OBSERVATION, "<f4").reshape(rows, self.observation_dim)
        self._action = self._array(ACTION, "<f4").reshape(rows, self.action_dim)
        self._reward = self._array(REWARD, "<f4")
        self._terminated = self._array(TERMINATED, "u1") if manifest["has_terminated"] else None

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Open a finished store.

        Raises:
            ConfigurationError: if the folder is not a store, its import is not finished, it has a newer version, or its
                files are missing or truncated.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest["state"] != FINISHED:
            raise ConfigurationError(
                f"the import into the episode store {path} is not finished ({manifest['episodes']:,} episodes so far); "
                f"run the same '{typed('data')} import' again to continue it"
            )
        for name, size in file_sizes(manifest).items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise ConfigurationError(
                    f"the episode store {path} is damaged: {name} {what}, {size:,} are expected; copy it again or "
                    "import the data again"
                )
        return cls(path, manifest)

    def fingerprint(self) -> str:
        """A hash of tasks, dimensions, and the length, task and return of every episode; it does not depend on the
        store's path, and no row is read.
        """
        digest = hashlib.sha256()
        facts = [self.task_names, self.observation_dims, self.action_dims, self.num_episodes, self.num_transitions]
        digest.update(json.dumps(facts).encode())
        for column in (self.length, self.task, self._returns):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple:
        # Workers map the files themselves, so only the path is pickled.
        return EpisodeStore.open, (self.path,)

    def __repr__(self) -> str:
        return (
            f"EpisodeStore({str(self.path)!r}: {len(self.task_names)} tasks, {self.num_episodes:,} episodes, "
            f"{self.num_transitions:,} transitions)"
        )

    def returns(self, episodes: Ints | None = None) -> npt.NDArray[np.float64]:
        """Undiscounted returns.

        Args:
            episodes (numpy.ndarray, optional): numbers of episodes. Defaults to ``None``, all.
        """
        return self._returns.copy() if episodes is None else self._returns[episodes]

    def episode_of(self, rows: Ints) -> Ints:
        """Number of each row's episode."""
        return np.searchsorted(self.first_row, rows, side="right") - 1

    def slices(self, rows: Ints | Tensor, horizon: int) -> TensorDict:
        """Read slices of consecutive transitions.

        Args:
            rows (numpy.ndarray or Tensor): row of each slice's first observation, int64 ``[B]``.
            horizon (int): H, transitions per slice.

        Returns:
            TensorDict: batch size ``[B, H]``: ``observation``, ``action``, ``task`` (int64) and under ``next``
            ``observation``, ``reward``, ``done`` and ``terminated`` (both bool, ``[B, H, 1]``). ``done`` is set in the
            last transition of an episode. The two observations are views of one tensor ``[B, H + 1, O]``.

        Raises:
            IndexError: if a slice is not within one episode.
        """
        rows = self._rows(rows)
        episode = self.episode_of(rows)
        last = self.first_row[episode] + self.length[episode]
        if horizon < 1 or (rows.size and (rows + horizon > last).any()):
            raise IndexError(f"a slice of horizon={horizon} transitions is not within one episode")
        observation = torch.from_numpy(_windows(self._observation, horizon + 1)[rows])
        following = rows + 1
        ends = last[:, None] == following[:, None] + np.arange(horizon)
        done = torch.from_numpy(ends).unsqueeze(-1)
        if self._terminated is None:
            terminated = torch.zeros_like(done)
        else:
            flags = _windows(self._terminated, horizon)[following].astype(bool)
            terminated = torch.from_numpy(flags).unsqueeze(-1)
        batch = [len(rows), horizon]
        following_td = TensorDict(
            observation=observation[:, 1:],
            reward=torch.from_numpy(_windows(self._reward, horizon)[following]).unsqueeze(-1),
            done=done,
            terminated=terminated,
            batch_size=batch,
        )
        return TensorDict(
            observation=observation[:, :-1],
            action=torch.from_numpy(_windows(self._action, horizon)[following]),
            task=torch.from_numpy(self.task[episode]).unsqueeze(-1).repeat(1, horizon),
            next=following_td,
            batch_size=batch,
        )

    def prefetch(self, rows: Ints | Tensor, horizon: int) -> None:
        """Request all pages of a batch in parallel, before :meth:`slices` reads them one after the other.

        This helps if the store is larger than memory; if it is cached, it costs a few milliseconds.

        Args:
            rows (numpy.ndarray or Tensor): as for :meth:`slices`.
            horizon (int): as for :meth:`slices`.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        widths = bytes_per_row(self.observation_dim, self.action_dim)
        first = np.sort(self._rows(rows))
        for name, mapping in self._files.items():
            begin = first * widths[name]
            end = np.minimum(begin + (horizon + 1) * widths[name], len(mapping))
            begin -= begin % mmap.PAGESIZE
            for start, stop in zip(begin.tolist(), end.tolist()):
                mapping.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def observations(self, rows: Ints | Tensor) -> Tensor:
        """Observations ``[B, O]`` of rows ``[B]``."""
        return torch.from_numpy(self._observation[self._rows(rows)])

    def rewards(self, rows: Ints | Tensor) -> Tensor:
        """Rewards ``[B, 1]`` of the transitions into rows ``[B]``; 0 for an episode's first row, which has none."""
        return torch.from_numpy(self._reward[self._rows(rows)]).unsqueeze(-1)

    def episode_rows(self, episode: int, most: int | None = None) -> EpisodeRows:
        """A copy of an episode's rows, without padding.

        Args:
            episode (int): number of the episode.
            most (int, optional): maximum number of rows, from the first one. Defaults to ``None``, all.
        """
        task, first, length = int(self.task[episode]), int(self.first_row[episode]), int(self.length[episode])
        count = length + 1 if most is None else min(length + 1, most)
        part = slice(first, first + count)
        ended = self._terminated is not None and bool(self._terminated[first + length]) and count == length + 1
        return EpisodeRows(
            self._observation[part, : self.observation_dims[task]].copy(),
            self._action[part, : self.action_dims[task]].copy(),
            self._reward[part].copy(),
            np.array([count - 1]),
            np.array([task]),
            np.array([ended]),
        )

    def _array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        return np.frombuffer(self._files[name], dtype) if name in self._files else np.empty(0, dtype)

    def _rows(self, rows: Ints | Tensor) -> Ints:
        """Row numbers as a checked array; numpy would accept negative ones."""
        array = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.num_rows):
            raise IndexError(f"rows from {array.min()} to {array.max()} are not all in [0, {self.num_rows})")
        return array


def _table(path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read a small array into memory.

    Raises:
        ConfigurationError: if it is missing, damaged or has another shape.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigurationError(f"the episode store {path.parent} is damaged: {path.name} cannot be read") from error
    if array.shape != shape:
        raise ConfigurationError(
            f"the episode store {path.parent} is damaged: {path.name} has shape {array.shape} instead of {shape}"
        )
    return array


def _mapped(path: Path) -> mmap.mmap:
    """Map a file for reading, without read-ahead because the drawn rows are scattered."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def _windows(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """View ``[rows − length + 1, length, ...]`` of an array ``[rows, ...]``, so that a slice is one contiguous copy."""
    shape = (max(0, len(array) - length + 1), length, *array.shape[1:])
    return np.lib.stride_tricks.as_strided(array, shape, (array.strides[0], *array.strides), writeable=False)
