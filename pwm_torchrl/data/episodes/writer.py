"""Writing an episode store, by one process at a time and resumable after a kill, and copying it to a local disk.

The rows of a source are appended after the rows that the manifest counts. A commit flushes the data, then replaces the
episode tables, then the manifest. Rows beyond the manifest's counts were never committed and are truncated when the
import continues.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.data.episodes import store as layout
from pwm_torchrl.data.episodes.store import EpisodeRows, EpisodeStore
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import amount, free_bytes, replacing, storage_faults, sync_folder, write_all, write_durably
from pwm_torchrl.progress import new_bar
from pwm_torchrl.terminal import LINE_EVERY_S, say

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "ByteProgress",
    "EpisodeRows",
    "StoreLocked",
    "StoreWriter",
    "locked",
    "stage_store",
]

# Lock -----------------------------------------------------------------------------------------------------------------


class StoreLocked(RuntimeError):
    """Another process holds the lock; the message names the process if it is known."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock inside the block. The kernel releases it if the process is killed.

    Args:
        path (Path): the lock file; it is created if needed and never deleted.

    Keyword Args:
        wait (bool): wait until the lock is free. Defaults to ``False``.

    Raises:
        StoreLocked: if another process holds the lock and ``wait`` is off.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            raise StoreLocked(holder or "another process") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


# Progress of an import: a bar on a terminal, lines elsewhere ----------------------------------------------------------


class ByteProgress(contextlib.AbstractContextManager["ByteProgress"]):
    """Shows on stderr how many bytes have been read.

    Args:
        total (int): bytes to read.
        enabled (bool): whether to show anything.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self.total, self.done = total, 0
        self.shown = time.monotonic()
        self.enabled = enabled
        self.bar = new_bar("B") if enabled else None
        self.what = ""
        if self.bar is not None:
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def describe(self, what: str) -> None:
        """Set the name of what is being read."""
        self.what = what
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def advance(self, count: int) -> None:
        """Add ``count`` bytes."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.task, count)
        elif self.enabled and time.monotonic() - self.shown >= LINE_EVERY_S:
            self.shown = time.monotonic()
            self.say(f"{self.done / max(1, self.total):.0%} of {self.total / 2**30:.1f} GiB  {self.what}")

    def say(self, line: str) -> None:
        """Print a line above the bar, if progress is shown."""
        if self.enabled:
            say(line, err=True)


# Writer ---------------------------------------------------------------------------------------------------------------


LOCK_FILE = ".lock"
#: Quantiles of the returns in the manifest.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class StoreWriter(contextlib.AbstractContextManager["StoreWriter"]):
    """Creates a store, or continues an unfinished one. It is a context manager that holds the store's lock.

    Args:
        path (str or Path): the folder; created if needed.
        tasks (TaskSet): the tasks, in the order of their indices.

    Attributes:
        manifest (dict): everything committed so far.

    Raises:
        ConfigurationError: on entering, if another process writes the store, or the folder contains other files or an
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
        """Whether the store is finished."""
        return self.manifest["state"] == layout.FINISHED

    def __enter__(self) -> StoreWriter:
        with contextlib.ExitStack() as stack:
            self._begin_folder()
            try:
                stack.enter_context(locked(self.path / LOCK_FILE))
            except StoreLocked as busy:
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
        """Append episodes; they become part of the store with :meth:`commit`.

        Raises:
            StorageFault: if the disk is full or fails.
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
        """The current end of the data, for :meth:`roll_back`."""
        return self._episodes, self._rows, self._terminated

    def commit(self, sources: Sequence[Mapping[str, Any]]) -> None:
        """Make the appended episodes part of the store.

        Args:
            sources (sequence of Mapping): manifest entries of their sources.

        Raises:
            StorageFault: if the disk is full or fails.
        """
        self._save_data()
        self._write_manifest(
            episodes=self._episodes,
            transitions=self._rows - self._episodes,
            has_terminated=self._terminated,
            sources=[*self.manifest["sources"], *sources],
        )

    def roll_back(self, mark: tuple[int, int, bool] | None = None) -> None:
        """Remove the episodes appended after a mark.

        Args:
            mark (tuple, optional): result of :meth:`mark`. Defaults to ``None``, the last commit.
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
        """Finish the store, so that it can be opened.

        Args:
            **facts: additional entries of the manifest.

        Raises:
            StorageFault: if the disk is full or fails.
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
        """Check that the disk has enough space for a number of rows.

        Raises:
            ConfigurationError: if it has not.
        """
        widths = layout.bytes_per_row(self.tasks.observation_dim, self.tasks.action_dim)
        needed, free = rows * sum(widths.values()), free_bytes(self.path)
        if needed > free:
            raise ConfigurationError(
                f"the episode store {self.path} needs {amount(needed)} more, but only {amount(free)} are free there; "
                "free space or choose another folder, then run the same import again"
            )

    def _save_data(self) -> None:
        """Flush all rows and the episode tables to the disk."""
        self._table = [self._whole_table()]
        self._returns = [np.concatenate([np.empty(0), *self._returns])]
        with self._faults("write to"):
            if self._terminated:
                os.ftruncate(self._files[layout.TERMINATED], self._rows)  # fills unwritten rows with zeros
            for descriptor in self._files.values():
                os.fsync(descriptor)
            _save_durably(self.path / layout.EPISODES, self._table[0])
            _save_durably(self.path / layout.RETURNS, self._returns[0])
            sync_folder(self.path)

    def _whole_table(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.empty((0, 3), np.int64), *self._table])

    def _faults(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return storage_faults(self.path, doing, remedy="run the same import again to continue it")

    def _begin_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE}
        except OSError as error:
            raise ConfigurationError(
                f"the folder {self.path} of an episode store cannot be made: {error.strerror}"
            ) from error
        # A kill during the first write leaves a temporary file of the manifest.
        others = {name for name in others if not name.startswith(f".{layout.MANIFEST}.")}
        if others and layout.MANIFEST not in others:
            raise ConfigurationError(
                f"the folder {self.path} contains {min(others)} and is not an episode store; choose an empty or new "
                "folder"
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
                f"the episode store {self.path} was started with other tasks ({_shortened([row[0] for row in found])}) "
                f"than those of --tasks={self.tasks.name}; use the same tasks or choose another folder"
            )

    def _check_sizes(self) -> None:
        """Check that all committed rows are on the disk."""
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
    """Manifest entries of one task."""
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
    # An open file: np.save would add .npy to the name of the temporary file.
    with replacing(path, durable=True) as draft, draft.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# Copies of a finished store on a node's local disk --------------------------------------------------------------------


_BLOCK = 1 << 23


def stage_store(path: str | Path, scratch: str | Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Copy a store to a node's local disk, once for all processes on the node.

    While one process copies, others wait. The copy is renamed to its final name when it is complete and its checksums
    match the source. A missing, incomplete or outdated copy is made again.

    Args:
        path (str or Path): the store.
        scratch (str or Path): a folder on the local disk; created if needed.

    Keyword Args:
        say (callable): called with progress messages. Defaults to no messages.

    Returns:
        Path: the copy.

    Raises:
        ConfigurationError: if there is no finished store, or too little space for it in ``scratch``.
        StorageFault: if the disk fails, or the data read back differ from those written.
    """
    source, folder = EpisodeStore.open(path).path.resolve(), Path(scratch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the scratch folder {folder} cannot be made: {error.strerror}") from error
    target = folder / _name(source)
    with locked(folder / f".{target.name}.lock", wait=True):
        if _is_copy(source, target):
            say(f"{target} is a complete copy of {source}")
            return target
        draft = folder / f".{target.name}.part"
        for old in (draft, target):
            if old.exists():
                shutil.rmtree(old)
        _require_room(source, folder)
        say(f"copying {source} to {target}")
        draft.mkdir()
        # The manifest is copied last; without it, the folder is not a store.
        for name in (*_data_files(source), layout.MANIFEST):
            _copy(source / name, draft / name)
        sync_folder(draft)
        draft.replace(target)
        sync_folder(folder)
    return target


def _name(source: Path) -> str:
    """Name of the copy: always the same for one store, and different for another store with the same name."""
    return f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"


def _data_files(source: Path) -> list[str]:
    names = [*layout.file_sizes(layout.read_manifest(source)), layout.EPISODES, layout.RETURNS]
    return [name for name in names if (source / name).exists()]


def _is_copy(source: Path, target: Path) -> bool:
    """Whether ``target`` is a complete copy of the store in its current state."""
    with contextlib.suppress(ConfigurationError, FileNotFoundError):
        same = (source / layout.MANIFEST).read_bytes() == (target / layout.MANIFEST).read_bytes()
        return same and EpisodeStore.open(target).num_rows >= 0
    return False


def _require_room(source: Path, folder: Path) -> None:
    needed = sum((source / name).stat().st_size for name in _data_files(source))
    free = free_bytes(folder)
    if needed > free:
        raise ConfigurationError(
            f"the scratch folder {folder} has too little space for the episode store {source}: {amount(needed)} are "
            f"needed and {amount(free)} are free; free space there, or do not copy the store (data.stage=none)"
        )


def _copy(source: Path, target: Path) -> None:
    """Copy a file and verify the copy.

    Raises:
        StorageFault: if the copy differs, or the disk is full or fails.
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
            _drop_cache(writer.fileno())
        found = 0
        with target.open("rb", buffering=0) as reader:
            while block := reader.read(_BLOCK):
                found = zlib.crc32(block, found)
    if found != written:
        raise StorageFault(f"The data read back from {target} differ from those written; check the disk of this node.")


def _drop_cache(descriptor: int) -> None:
    """Drop a file's cached pages, so that it is read back from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
