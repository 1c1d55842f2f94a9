"""Writing a store of episodes: one writer at a time, killed and resumed at any point.

A source's rows are appended behind what the manifest counts. Committing it waits for the data, then replaces the
tables of episodes, then the manifest: whatever lies behind the manifest's counts was never committed and is cut off
when the import goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.data.episodes import store as layout
from pwm_torchrl.data.episodes.store import EpisodeRows, EpisodeStore
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import amount, free_bytes, storage_faults, sync_folder, write_all, write_durably
from pwm_torchrl.terminal import LINE_EVERY_S, has_terminal, say

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "Busy",
    "ByteProgress",
    "EpisodeRows",
    "StoreWriter",
    "locked",
    "stage_store",
]

# One process at a time ------------------------------------------------------------------------------------------------


class Busy(RuntimeError):
    """Another process holds the lock; the message names it as far as it is known."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the kernel gives back when the process ends, however it ends.

    Args:
        path (Path): the lock's file; it is made if needed, and stays.

    Keyword Args:
        wait (bool): wait for whoever holds it. Defaults to ``False``.

    Raises:
        Busy: if another process holds it and ``wait`` is off.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            raise Busy(holder or "another process") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


# How far an import has come: a bar on a terminal, lines elsewhere -----------------------------------------------------


class ByteProgress(contextlib.AbstractContextManager["ByteProgress"]):
    """Shows on stderr how many of the bytes to read have been read.

    Args:
        total (int): bytes.
        enabled (bool): whether to show anything.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self.total, self.done = total, 0
        self.shown = time.monotonic()
        self.enabled = enabled
        self.bar: RichProgress | None = None
        self.what = ""
        if enabled and has_terminal(sys.stderr) and find_spec("rich"):
            from pwm_torchrl.display import counter

            self.bar = counter("B")
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def describe(self, what: str) -> None:
        """Say what is being read."""
        self.what = what
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.task, count)
        elif self.enabled and time.monotonic() - self.shown >= LINE_EVERY_S:
            self.shown = time.monotonic()
            self.say(f"{self.done / max(1, self.total):.0%} of {self.total / 2**30:.1f} GiB  {self.what}")

    def say(self, line: str) -> None:
        """A line beside the bar, if anything is shown."""
        if self.enabled:
            say(line, err=True)


# Writing an episode store, so that a kill at any moment loses only the source that was being read ---------------------


LOCK_FILE = ".lock"
#: Quantiles of the returns that the manifest lists.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class StoreWriter(contextlib.AbstractContextManager["StoreWriter"]):
    """Makes a store, or goes on with one that is not finished. Use it as a context manager: it holds the lock.

    Args:
        path (str or Path): the folder; made if needed.
        tasks (TaskSet): the tasks, in the order of their indices.

    Attributes:
        manifest (dict): what is committed so far.

    Raises:
        ConfigurationError: on entering, if another process writes the store, the folder holds something else, or an
            import for other tasks.
    """

    def __init__(self, path: str | Path, tasks: TaskSet) -> None:
        self.path = Path(path)
        self.tasks = tasks
        self.manifest: dict[str, Any] = {}
        self._files: dict[str, int] = {}
        self._stack = contextlib.ExitStack()
        self._table: list[npt.NDArray[np.int64]] = []
        self._returns: list[npt.NDArray[np.float64]] = []
        self._rows = self._episodes = 0
        self._terminated = False

    @property
    def finished(self) -> bool:
        """Whether the store is finished already."""
        return self.manifest["state"] == layout.FINISHED

    def __enter__(self) -> StoreWriter:
        with contextlib.ExitStack() as stack:
            self._begin_folder()
            try:
                stack.enter_context(locked(self.path / LOCK_FILE))
            except Busy as busy:
                raise ConfigurationError(
                    f"{busy} is importing into the episode store {self.path}; wait until it is done"
                ) from busy
            self._begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def append(self, rows: EpisodeRows) -> None:
        """Write episodes behind the others; they count once they are committed.

        Raises:
            StorageFault: if the disk is full or broken.
        """
        first = self._rows + rows.first
        with self._faults(f"write {amount(rows.observation.nbytes + rows.action.nbytes)} to"):
            for name, values in (
                (layout.OBSERVATION, rows.observation),
                (layout.ACTION, rows.action),
                (layout.REWARD, rows.reward),
            ):
                data = np.ascontiguousarray(values, dtype="<f4")
                width = data.nbytes // max(1, len(data))
                write_all(self._files[name], data.data.cast("B"), self._rows * width)
            if rows.terminated is not None and rows.terminated.any():
                flags = np.zeros(len(rows.reward), np.uint8)
                flags[(rows.first + rows.length)[rows.terminated]] = 1
                write_all(self._files[layout.TERMINATED], flags.data, self._rows)
                self._terminated = True
        self._table.append(np.stack([first, rows.length, rows.task], 1))
        self._returns.append(rows.returns())
        self._rows += len(rows.reward)
        self._episodes += len(rows.length)

    def mark(self) -> tuple[int, int, bool]:
        """The present end, for :meth:`roll_back`."""
        return self._episodes, self._rows, self._terminated

    def commit(self, sources: Sequence[Mapping[str, Any]]) -> None:
        """Make what was appended part of the store.

        Args:
            sources (sequence of Mapping): the manifest's records of where it came from.

        Raises:
            StorageFault: if the disk is full or broken.
        """
        self._save_data()
        self._write_manifest(
            episodes=self._episodes,
            transitions=self._rows - self._episodes,
            has_terminated=self._terminated,
            sources=[*self.manifest["sources"], *sources],
        )

    def roll_back(self, mark: tuple[int, int, bool] | None = None) -> None:
        """Forget what was appended since a mark.

        Args:
            mark (tuple, optional): of :meth:`mark`. Defaults to ``None``: the last commit.
        """
        if mark is None:
            episodes, transitions = self.manifest["episodes"], self.manifest["transitions"]
            mark = episodes, episodes + transitions, self.manifest["has_terminated"]
        self._episodes, self._rows, self._terminated = mark
        self._table = [self._whole_table()[: self._episodes]]
        self._returns = [np.concatenate([np.empty(0), *self._returns])[: self._episodes]]
        widths = layout.bytes_per_row(self.tasks.observation_dim, self.tasks.action_dim)
        for name, descriptor in self._files.items():
            keep = self._rows if name != layout.TERMINATED or self._terminated else 0
            os.ftruncate(descriptor, keep * widths[name])

    def finish(self, **facts: Any) -> None:
        """Open the store to readers.

        Args:
            **facts: more entries of the manifest.

        Raises:
            StorageFault: if the disk is full or broken.
        """
        self.roll_back()
        self._save_data()
        table, returns = self._table[0], self._returns[0]
        tasks = [
            {**task, **_task_facts(table[table[:, 2] == index], returns[table[:, 2] == index])}
            for index, task in enumerate(self.manifest["tasks"])
        ]
        absent = [task["name"] for task in tasks if not task["episodes"]]
        self._write_manifest(state=layout.FINISHED, tasks=tasks, tasks_without_data=absent, **facts)
        if not self._terminated:
            (self.path / layout.TERMINATED).unlink()

    def require_room(self, rows: int) -> None:
        """Refuse to begin what the disk has no room for.

        Raises:
            ConfigurationError: if it has not.
        """
        widths = layout.bytes_per_row(self.tasks.observation_dim, self.tasks.action_dim)
        needed, free = rows * sum(widths.values()), free_bytes(self.path)
        if needed > free:
            raise ConfigurationError(
                f"the episode store {self.path} needs {amount(needed)} more, and {amount(free)} are free there; free "
                "space or choose another folder, then run the same import again"
            )

    def _save_data(self) -> None:
        """Wait until all rows and the tables of episodes are on the disk."""
        self._table = [self._whole_table()]
        self._returns = [np.concatenate([np.empty(0), *self._returns])]
        with self._faults("write to"):
            if self._terminated:
                os.ftruncate(self._files[layout.TERMINATED], self._rows)  # zeros where nothing was written
            for descriptor in self._files.values():
                os.fsync(descriptor)
            _save_durably(self.path / layout.EPISODES, self._table[0])
            _save_durably(self.path / layout.RETURNS, self._returns[0])
            sync_folder(self.path)

    def _whole_table(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.empty((0, 3), np.int64), *self._table])

    def _faults(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return storage_faults(self.path, doing, remedy="run the same import again: it goes on where it was")

    def _begin_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE}
        except OSError as error:
            raise ConfigurationError(
                f"the folder {self.path} of an episode store cannot be made: {error.strerror}"
            ) from error
        # A draft of the first manifest is what a kill in the first moment leaves.
        if others - {f".{layout.MANIFEST}.new"} and layout.MANIFEST not in others:
            raise ConfigurationError(
                f"the folder {self.path} holds {min(others)} and is no episode store; choose an empty or new folder"
            )

    def _begin(self, stack: contextlib.ExitStack) -> None:
        if (self.path / layout.MANIFEST).exists():
            self.manifest = layout.read_manifest(self.path)
            self._check_tasks()
        else:
            self._write_manifest(**_empty_manifest(self.tasks))
        if self.finished:
            return
        for name in layout.bytes_per_row(1, 1):
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            stack.callback(os.close, descriptor)
            self._files[name] = descriptor
        sync_folder(self.path)
        if self.manifest["episodes"]:
            self._table = [np.load(self.path / layout.EPISODES, allow_pickle=False)]
            self._returns = [np.load(self.path / layout.RETURNS, allow_pickle=False)]
        self._check_sizes()
        self.roll_back()

    def _check_tasks(self) -> None:
        found = [(task["name"], task["observation_dim"], task["action_dim"]) for task in self.manifest["tasks"]]
        if found != [(task.name, task.observation_dim, task.action_dim) for task in self.tasks.tasks]:
            raise ConfigurationError(
                f"the episode store {self.path} was begun with other tasks ({_shortened([row[0] for row in found])}) "
                f"than --tasks={self.tasks.name} gives; name the same tasks or choose another folder"
            )

    def _check_sizes(self) -> None:
        """Committed rows were on the disk before the manifest counted them."""
        for name, size in layout.file_sizes(self.manifest).items():
            if os.fstat(self._files[name]).st_size < size:
                raise ConfigurationError(
                    f"the unfinished episode store {self.path} is damaged: {name} is shorter than the {size:,} bytes "
                    "that were written; delete the folder and import again"
                )

    def _write_manifest(self, **entries: Any) -> None:
        self.manifest = {**self.manifest, **entries}
        with self._faults("write the manifest of"):
            write_durably(self.path / layout.MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


def _empty_manifest(tasks: TaskSet) -> dict[str, Any]:
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "state": layout.IMPORTING,
        "task_set": tasks.name,
        "observation_dim": tasks.observation_dim,
        "action_dim": tasks.action_dim,
        "episodes": 0,
        "transitions": 0,
        "has_terminated": False,
        "tasks": [
            {"name": task.name, "observation_dim": task.observation_dim, "action_dim": task.action_dim}
            for task in tasks.tasks
        ],
        "sources": [],
    }


def _task_facts(table: npt.NDArray[np.int64], returns: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The manifest's numbers of one task."""
    if not len(table):
        return {"episodes": 0, "transitions": 0}
    return {
        "episodes": len(table),
        "transitions": int(table[:, 1].sum()),
        "lengths": [int(table[:, 1].min()), int(table[:, 1].max())],
        "mean_return": float(returns.mean()),
        "return_quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(returns, QUANTILES))},
    }


def _save_durably(path: Path, array: npt.NDArray[Any]) -> None:
    draft = path.with_name(f".{path.name}.new")
    with draft.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# Copies of a finished store on a node's local disk
# ---------------------------------------------------------------------


_BLOCK = 1 << 23


def stage_store(path: str | Path, scratch: str | Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Copy a store to a node's own disk, once for all processes there.

    Processes that come while one copies wait for it. A copy appears under its name when it is whole and its checksums
    are those of what was read; one that is missing, incomplete or of another version of the store is made again.

    Args:
        path (str or Path): the store.
        scratch (str or Path): a folder on the node's disk; made if needed.

    Keyword Args:
        say (callable): is told what is done. Defaults to silence.

    Returns:
        Path: the copy.

    Raises:
        ConfigurationError: if there is no finished store, or no room for it in ``scratch``.
        StorageFault: if the disk breaks, or what was written is not what is read back.
    """
    source, folder = EpisodeStore.open(path).path.resolve(), Path(scratch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the scratch folder {folder} cannot be made: {error.strerror}") from error
    target = folder / _name(source)
    with locked(folder / f".{target.name}.lock", wait=True):
        if _is_copy(source, target):
            say(f"{target} is a whole copy of {source}")
            return target
        draft = folder / f".{target.name}.part"
        for old in (draft, target):
            if old.exists():
                shutil.rmtree(old)
        _require_room(source, folder)
        say(f"copying {source} to {target}")
        draft.mkdir()
        # The manifest is last: without it nothing takes the folder for a store.
        for name in (*_data_files(source), layout.MANIFEST):
            _copy(source / name, draft / name)
        sync_folder(draft)
        draft.replace(target)
        sync_folder(folder)
    return target


def _name(source: Path) -> str:
    """The same for a store wherever it is asked for, another for another store of the same name."""
    return f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"


def _data_files(source: Path) -> list[str]:
    names = [*layout.file_sizes(layout.read_manifest(source)), layout.EPISODES, layout.RETURNS]
    return [name for name in names if (source / name).exists()]


def _is_copy(source: Path, target: Path) -> bool:
    """Whether a whole copy lies there: of this store as it is now, and with all its bytes."""
    with contextlib.suppress(ConfigurationError, FileNotFoundError):
        same = (source / layout.MANIFEST).read_bytes() == (target / layout.MANIFEST).read_bytes()
        return same and EpisodeStore.open(target).num_rows >= 0
    return False


def _require_room(source: Path, folder: Path) -> None:
    needed = sum((source / name).stat().st_size for name in _data_files(source))
    free = free_bytes(folder)
    if needed > free:
        raise ConfigurationError(
            f"the scratch folder {folder} has no room for the episode store {source}: {amount(needed)} are needed and "
            f"{amount(free)} are free; free space there, or read the store where it is (data.stage=none)"
        )


def _copy(source: Path, target: Path) -> None:
    """Copy a file and read it back.

    Raises:
        StorageFault: if the two differ, or the disk is full or broken.
    """
    with storage_faults(target, "copy the episode store to", source.stat().st_size, "start the job again"):
        written = 0
        with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
            while block := reader.read(_BLOCK):
                written = zlib.crc32(block, written)
                view = memoryview(block)
                while view:
                    view = view[writer.write(view) :]
            os.fsync(writer.fileno())
            _forget(writer.fileno())
        found = 0
        with target.open("rb", buffering=0) as reader:
            while block := reader.read(_BLOCK):
                found = zlib.crc32(block, found)
    if found != written:
        raise StorageFault(f"What was written to {target} is not what is read back; check the disk of this node.")


def _forget(descriptor: int) -> None:
    """Let what is read back come from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
