"""Import of a user's own episode files and of Minari data sets.

An episode of L transitions consists of

- ``observation`` ``[L + 1, O]``, including the observation after the last transition,
- ``action`` ``[L, A]`` in [−1, 1] and ``reward`` ``[L]`` of the transition from observation t to t + 1,
- ``terminated``, optional: whether it ended by termination; false by default,
- ``task``, optional: the task's name; required if the set has several tasks and no common task is given.

O and A are the task's own dimensions, without padding. In ``*.npz``, these are the arrays' names, or
``NAME/observation`` and so on for several episodes. In ``*.h5`` and ``*.hdf5``, they are datasets of the file, or of
one group per episode. Groups without any of them are ignored.

Two layouts of other projects are also supported: D4RL's, whose ``observations``, ``actions``, ``rewards`` and
``terminals`` (optionally ``timeouts``, ``next_observations``) contain all episodes one after the other
(:func:`flat_episodes`), and that of Minari's ``main_data.hdf5``, with one group per episode, ``terminations`` and
``truncations``.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pwm_torchrl.data.episodes.sources import Advance, hash_file
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows, check_rows
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["PREFIX", "EpisodeFile", "MinariData", "episode_rows"]

# Files with one or more episodes --------------------------------------------------------------------------------------


SUFFIXES = (".npz", ".h5", ".hdf5")
_NEEDED = ("observation", "action", "reward")
_KNOWN = (*_NEEDED, "terminated", "task")

#: Names in Minari's files.
_MINARI = {"observations": "observation", "actions": "action", "rewards": "reward", "terminations": "terminated"}
_FLAT = ("observations", "actions", "rewards", "terminals")

#: Reads one of an episode's arrays, or a part of it.
Get = Callable[..., Any]
#: Episodes by label, each with its keys and a function that reads one of them.
Episodes = Mapping[str, tuple[set[str], Get]]


class EpisodeFile:
    """A file of episodes as a source.

    Args:
        path (Path): the file.
        task (str, optional): task name for episodes without one. Defaults to ``None``.
        name (str, optional): name of the source. Defaults to ``None``, the file's name.
    """

    def __init__(self, path: Path, task: str | None = None, name: str | None = None) -> None:
        self.path = path
        self.task = task
        self.name = name or path.name
        self.size = path.stat().st_size

    def check(self, tasks: TaskSet) -> int:
        """Check that the file can be opened and contains the arrays; returns the estimated number of rows.

        Raises:
            BadEpisodes: if it cannot be opened, or an array is missing.
        """
        with self._opened() as episodes:
            if not episodes:
                raise BadEpisodes("contains no episode")
            for label, (keys, _) in episodes.items():
                missing = [key for key in _NEEDED if key not in keys]
                if missing:
                    raise BadEpisodes(
                        f"{_of(label)}has no {', '.join(missing)}; it has {', '.join(sorted(keys)) or 'nothing'}"
                    )
        return self.size // (4 * (tasks.observation_dim + tasks.action_dim + 1))

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the file.

        Raises:
            BadEpisodes: if it cannot be read.
        """
        return hash_file(self.path, advance)

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Yield the episodes one by one.

        Raises:
            BadEpisodes: at the first episode that cannot be imported.
        """
        with self._opened() as episodes:
            for label, (keys, get) in episodes.items():
                try:
                    values = {key: np.asarray(get(key)) for key in _KNOWN if key in keys}
                except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
                    raise BadEpisodes(f"{_of(label)}cannot be read: {' '.join(str(error).split())}") from error
                try:
                    yield episode_rows(values, tasks, self.task)
                except BadEpisodes as bad:
                    raise BadEpisodes(f"{_of(label)}{bad}") from bad

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Episodes]:
        with _npz(self.path) if self.path.suffix == ".npz" else _hdf5(self.path) as found:
            yield _recognised(found)


def _of(label: str) -> str:
    return f"episode {label!r}: " if label else ""


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[Mapping[str, tuple[set[str], Get]]]:
    """Episodes by label, each with its keys and a function that reads one of them."""
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadEpisodes("is not a complete npz file") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise BadEpisodes("is not an npz file")
    with archive:
        found: dict[str, tuple[set[str], Get]] = {}
        for full in archive.files:
            label, _, key = full.rpartition("/")
            found.setdefault(label, (set(), _getter(archive, f"{label}/" if label else "")))[0].add(key)
        yield found


def _getter(container: Any, prefix: str) -> Get:
    kept: dict[str, Any] = {}  # an archive reads the whole array for every part, so keep it

    def get(key: str, part: slice | None = None) -> Any:
        if part is None:
            return container[prefix + key]
        if key not in kept:
            kept[key] = container[prefix + key]
        return kept[key][part]

    return get


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[Mapping[str, tuple[set[str], Get]]]:
    try:
        import h5py
    except ImportError as error:
        raise MissingLibraryError(f"reading {path.name} needs h5py: pip install 'pwm-torchrl[hdf5]'") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise BadEpisodes("is not a complete HDF5 file") from error
    with file:
        groups = {name: item for name, item in file.items() if isinstance(item, h5py.Group)}
        found = {name: (set(group), _dataset_getter(group)) for name, group in groups.items()}
        yield {"": (set(file) - set(groups), _dataset_getter(file)), **found}


def _dataset_getter(group: Any) -> Get:
    return lambda key, part=None: group[key][() if part is None else part]


def _recognised(found: Episodes) -> Episodes:
    """The episodes among the groups of a file, in any supported layout, under our keys."""
    episodes: dict[str, tuple[set[str], Get]] = {}
    for label, (keys, get) in found.items():
        if keys & set(_NEEDED):
            episodes[label] = keys, get
        elif keys >= set(_FLAT):
            episodes.update(flat_episodes(label, keys, get))
        elif keys >= {"observations", "actions", "rewards", "terminations"}:
            episodes[label] = {ours for theirs, ours in _MINARI.items() if theirs in keys}, _minari_getter(get)
    if found and not episodes:
        seen = {f"{label}/{key}" if label else key for label, (keys, _) in found.items() for key in keys}
        listed = ", ".join(sorted(seen)[:12]) or "nothing"
        raise BadEpisodes(
            f"has {listed}; it needs {', '.join(_NEEDED)} of each episode, or D4RL's {', '.join(_FLAT)}, or Minari's "
            "observations, actions, rewards, terminations"
        )
    return episodes


def _minari_getter(get: Get) -> Get:
    theirs = {ours: name for name, ours in _MINARI.items()}

    def read(key: str) -> Any:
        values = np.asarray(get(theirs[key]))
        return bool(values[-1:].any()) if key == "terminated" else values

    return read


def flat_episodes(label: str, keys: set[str], get: Get) -> Episodes:
    """Episodes in D4RL's layout (https://github.com/Farama-Foundation/D4RL), which concatenates them.

    An episode ends at a step with ``terminals`` or ``timeouts``, or where ``next_observations`` differ from the
    observations of the next row. Without ``next_observations``, the file lacks the observation after an episode's last
    step, so this step and its termination are dropped.

    Args:
        label (str): label of the group; an episode's label also contains its range of steps.
        keys (set of str): keys in the group.
        get (callable): reads one of them.

    Raises:
        BadEpisodes: if arrays have different lengths, or the file does not say where episodes are truncated.
    """
    ends = np.asarray(get("terminals")).reshape(-1).astype(bool)
    terminated, steps, whole = ends.copy(), len(ends), "next_observations" in keys
    for key in (*_FLAT, *({"timeouts", "next_observations"} & keys)):
        if len(get(key)) != steps:
            raise BadEpisodes(f"{_of(label)}has {len(get(key))} {key} but {steps} terminals")
    if "timeouts" in keys:
        ends |= np.asarray(get("timeouts")).reshape(-1).astype(bool)
    elif not whole:
        raise BadEpisodes(
            f"{_of(label)}has neither timeouts nor next_observations, so the ends of truncated episodes are unknown"
        )
    if whole:
        after, following = np.asarray(get("next_observations"))[:-1], np.asarray(get("observations"))[1:]
        ends[:-1] |= (after != following).reshape(steps - 1, -1).any(1)
    ends[-1:] = True
    found: dict[str, tuple[set[str], Get]] = {}
    first = 0
    for end in np.flatnonzero(ends) + 1:
        last = int(end) if whole else int(end) - 1
        if last > first:
            part = _flat_getter(get, first, last, whole, bool(terminated[end - 1]) and whole)
            found[f"{label}[{first}:{last}]"] = {*_NEEDED, "terminated"}, part
        first = int(end)
    return found


def _flat_getter(get: Get, first: int, last: int, whole: bool, terminated: bool) -> Get:
    def read(key: str) -> Any:
        if key == "terminated":
            return terminated
        if key == "observation" and whole:
            steps = get("observations", slice(first, last))
            return np.concatenate([steps, get("next_observations", slice(last - 1, last))])
        if key == "observation":
            return get("observations", slice(first, last + 1))
        return get(key + "s", slice(first, last))

    return read


def episode_rows(values: Mapping[str, Any], tasks: TaskSet, task: str | None = None) -> EpisodeRows:
    """Convert an episode to rows of a store, padded and checked.

    Args:
        values (Mapping): the arrays described in the module's docstring.
        tasks (TaskSet): the task set.
        task (str, optional): task name if ``values`` has none. Defaults to ``None``.

    Raises:
        BadEpisodes: if a shape is wrong, the task is not in the set, or a value is invalid.
    """
    index = _task_index(values.get("task"), tasks, task)
    observation_dim, action_dim = tasks.observation_dims[index], tasks.action_dims[index]
    arrays = {key: _as_float(key, values[key]) for key in _NEEDED}
    length = len(arrays["reward"]) if arrays["reward"].ndim else 0
    if arrays["reward"].shape == (length, 1):
        arrays["reward"] = arrays["reward"][:, 0]
    wanted = {
        "reward": (length,),
        "observation": (length + 1, observation_dim),
        "action": (length, action_dim),
    }
    for key, shape in wanted.items():
        if arrays[key].shape != shape or not length:
            raise BadEpisodes(
                f"{key} has shape {list(arrays[key].shape)} instead of {list(shape)} for task {tasks.names[index]!r} "
                f"and {length} rewards; at least 1 transition is needed"
            )
    rows = EpisodeRows(
        np.zeros((length + 1, tasks.observation_dim), np.float32),
        np.zeros((length + 1, tasks.action_dim), np.float32),
        np.zeros(length + 1, np.float32),
        np.array([length]),
        np.array([index]),
        np.array([_flag(values.get("terminated", False))]),
    )
    rows.observation[:, :observation_dim] = arrays["observation"]
    rows.action[1:, :action_dim] = arrays["action"]
    rows.reward[1:] = arrays["reward"]
    check_rows(rows, tasks, labels=False)
    return rows


def _as_float(key: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise BadEpisodes(f"{key} is {array.dtype}; numbers are needed")
    with np.errstate(over="ignore"):  # values beyond float32's range become infinite and are refused later
        return array.astype(np.float32)


def _flag(value: Any) -> bool:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "bui":
        raise BadEpisodes(f"terminated has shape {list(array.shape)} and type {array.dtype}; one bool is needed")
    return bool(array.reshape(()))


def _task_index(value: Any, tasks: TaskSet, default: str | None) -> int:
    if value is not None:
        if np.size(value) != 1:
            raise BadEpisodes(f"task has shape {list(np.shape(value))}; one name is needed")
        value = np.asarray(value).reshape(-1)[0]
        name = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    elif default is not None:
        name = default
    elif len(tasks) == 1:
        return 0
    else:
        raise BadEpisodes(f"has no task, and the set {tasks.name} has {len(tasks)}; add it, or give --task NAME")
    try:
        return tasks.index(name)
    except ConfigurationError as error:
        raise BadEpisodes(str(error)) from error


# Minari data sets -----------------------------------------------------------------------------------------------------


PREFIX = "minari:"


class MinariData:
    """A Minari data set on this machine as a source.

    Args:
        dataset_id (str): Minari's name of the data set, such as ``"mujoco/hopper/expert-v0"``.
        task (str, optional): task name in the registry; not needed for a set of one task. Defaults to ``None``.

    Raises:
        MissingLibraryError: if Minari is not installed.
        ConfigurationError: if the data set is not on this machine.
    """

    def __init__(self, dataset_id: str, task: str | None = None) -> None:
        try:
            import minari
        except ImportError as error:
            raise MissingLibraryError(
                f"{PREFIX}{dataset_id} needs Minari: pip install 'pwm-torchrl[minari]'"
            ) from error
        try:
            self.data: Any = minari.load_dataset(dataset_id)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigurationError(
                f"Minari has no data set {dataset_id!r} on this machine; get it with 'minari download {dataset_id}'"
            ) from error
        self.name = PREFIX + dataset_id
        self.task = task
        width = 4 * (_width(self.data.observation_space) + _width(self.data.action_space) + 1)
        self.size = int(self.data.total_steps) * width

    def check(self, tasks: TaskSet) -> int:
        """Check that observations and actions are vectors of floats; returns the number of rows.

        Raises:
            BadEpisodes: if they are not.
        """
        for what, space in (("observations", self.data.observation_space), ("actions", self.data.action_space)):
            if len(getattr(space, "shape", None) or ()) != 1 or np.dtype(space.dtype).kind != "f":
                raise BadEpisodes(f"has {what} in {space} instead of vectors of floats")
        return int(self.data.total_steps) + int(self.data.total_episodes)

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the arrays."""
        found = hashlib.sha256()
        for episode in self.data.iterate_episodes():
            for values in (episode.observations, episode.actions, episode.rewards, episode.terminations):
                array = np.ascontiguousarray(values)
                found.update(f"{array.dtype}{array.shape}".encode())
                found.update(array.tobytes())
            advance(len(episode.rewards) * self.size // max(1, int(self.data.total_steps)))
        return found.hexdigest()

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Yield the episodes one by one.

        Raises:
            BadEpisodes: at the first episode that cannot be imported.
        """
        for number, episode in enumerate(self.data.iterate_episodes()):
            values = {
                "observation": episode.observations,
                "action": episode.actions,
                "reward": episode.rewards,
                "terminated": bool(np.asarray(episode.terminations)[-1:].any()),
            }
            try:
                yield episode_rows(values, tasks, self.task)
            except BadEpisodes as bad:
                raise BadEpisodes(f"episode {number}: {bad}") from bad


def _width(space: Any) -> int:
    return int(np.prod(getattr(space, "shape", None) or (1,)))
