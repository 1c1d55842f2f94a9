"""Reading an episode store."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from pwm_torchrl.commands import typed
from pwm_torchrl.data.episodes import layout
from pwm_torchrl.data.episodes.rows import EpisodeRows
from pwm_torchrl.errors import ConfigurationError

__all__ = ["EpisodeStore"]

Ints = npt.NDArray[np.int64]


class EpisodeStore:
    """Episodes of many tasks in memory-mapped files, read-only; :mod:`~pwm_torchrl.data.episodes.layout` describes
    them. Open one with :meth:`open`.

    Nothing but the table of episodes is held in memory, 32 bytes each; a read touches the rows that it returns.

    Attributes:
        path (Path): the folder.
        manifest (dict): ``manifest.json``.
        task_names (tuple of str): names, in the order of the tasks' indices.
        observation_dim (int): O, the width of the widest task.
        action_dim (int): ``A``.
        observation_dims (tuple of int): O of every task.
        action_dims (tuple of int): A of every task.
        num_episodes (int): ``E``.
        num_transitions (int): of all episodes.
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
        table = _table(path / layout.EPISODES, (self.num_episodes, 3))
        self.first_row, self.length, self.task = (np.ascontiguousarray(column) for column in table.T)
        self._returns = _table(path / layout.RETURNS, (self.num_episodes,))
        rows = self.num_rows = self.num_transitions + self.num_episodes
        self._files = {name: _mapped(path / name) for name, size in layout.file_sizes(manifest).items() if size}
        self._observation = self._array(layout.OBSERVATION, "<f4").reshape(rows, self.observation_dim)
        self._action = self._array(layout.ACTION, "<f4").reshape(rows, self.action_dim)
        self._reward = self._array(layout.REWARD, "<f4")
        self._terminated = self._array(layout.TERMINATED, "u1") if manifest["has_terminated"] else None

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Open a finished store.

        Raises:
            ConfigurationError: if the folder is no store, its import is not finished, it has a newer version, or its
                files are gone or cut short.
        """
        path = Path(path)
        manifest = layout.read_manifest(path)
        if manifest["state"] != layout.FINISHED:
            raise ConfigurationError(
                f"the import into the episode store {path} is not finished ({manifest['episodes']:,} episodes so far); "
                f"run the same '{typed('data')} import' again to go on with it"
            )
        for name, size in layout.file_sizes(manifest).items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                what = "is gone" if found is None else f"has {found:,} bytes"
                raise ConfigurationError(
                    f"the episode store {path} is damaged: {name} {what}, {size:,} are expected; copy it again or "
                    "import the data again"
                )
        return cls(path, manifest)

    def __reduce__(self) -> tuple:
        # Workers map the files themselves; nothing is sent but the path.
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
        """Number of the episode that each row belongs to."""
        return np.searchsorted(self.first_row, rows, side="right") - 1

    def slices(self, rows: Ints | Tensor, horizon: int) -> TensorDict:
        """Slices of consecutive transitions.

        Args:
            rows (numpy.ndarray or Tensor): row of the first observation of each slice, int64 ``[B]``.
            horizon (int): H, transitions per slice.

        Returns:
            TensorDict: batch size ``[B, H]``: ``observation``, ``action``, ``task`` (int64) and under ``next``
            ``observation``, ``reward``, ``done`` and ``terminated`` (both bool, ``[B, H, 1]``). ``done`` is set in an
            episode's last transition. The two observations are views of one tensor ``[B, H + 1, O]``.

        Raises:
            IndexError: if a slice would begin or end outside its episode.
        """
        rows = self._rows(rows)
        episode = self.episode_of(rows)
        last = self.first_row[episode] + self.length[episode]
        if horizon < 1 or (rows.size and (rows + horizon > last).any()):
            raise IndexError(f"a slice of {horizon} transitions must begin and end in one episode")
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
        """Ask the disk for all pages of a batch at once, before :meth:`slices` reads them one after the other.

        It pays where the store is larger than memory, and costs some milliseconds where it is cached.

        Args:
            rows (numpy.ndarray or Tensor): as for :meth:`slices`.
            horizon (int): likewise.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        widths = layout.bytes_per_row(self.observation_dim, self.action_dim)
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

    def episode_rows(self, episode: int, most: int | None = None) -> EpisodeRows:
        """Copy of an episode's rows, without padding.

        Args:
            episode (int): its number.
            most (int, optional): rows from its beginning. Defaults to ``None``, all.
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
        """As an array, checked: numpy would count negative ones from the end."""
        array = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.num_rows):
            raise IndexError(f"rows must lie in [0, {self.num_rows})")
        return array


def _table(path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A small array that is read whole.

    Raises:
        ConfigurationError: if it is gone, damaged or of another shape.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigurationError(f"the episode store {path.parent} is damaged: {path.name} cannot be read") from error
    if array.shape != shape:
        raise ConfigurationError(
            f"the episode store {path.parent} is damaged: {path.name} has shape {array.shape}, {shape} is expected"
        )
    return array


def _mapped(path: Path) -> mmap.mmap:
    """A file mapped for reading without looking ahead: the rows that are drawn lie far apart."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def _windows(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """View ``[rows − length + 1, length, ...]`` of an array ``[rows, ...]``: a slice is one contiguous copy."""
    shape = (max(0, len(array) - length + 1), length, *array.shape[1:])
    return np.lib.stride_tricks.as_strided(array, shape, (array.strides[0], *array.strides), writeable=False)
