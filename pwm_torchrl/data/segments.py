"""Replay buffer on disk: segment files, and a journal of the runs that wrote them."""

from __future__ import annotations

import json
import os
import struct
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.data.layout import RecordLayout, draw_starts, refuse_other_shape
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import (
    Unneeded,
    allocate,
    amount,
    free_bytes,
    storage_faults,
    sync_folder,
    write_all,
    write_durably,
)
from pwm_torchrl.memory.storage import disk_bytes, segment_steps
from pwm_torchrl.terminal import warn

# Journal: a JSON file with the layout of the segments and their writers -----------------------------------------------


#: Incremented when the files' layout changes.
SCHEMA_VERSION = 1
_JOURNAL_NAME = "replay.json"


@dataclass(frozen=True)
class Journal:
    """Description of a folder of segments.

    A run never overwrites its own data. A run that is resumed from an earlier checkpoint overwrites the later steps,
    and a new run overwrites everything. Each of these is a *writer* with a unique name and a first step, so that a
    checkpoint is never combined with data of another writer.

    Attributes:
        layout: layout of a record.
        num_envs: N.
        segment_steps: time steps per file; its records are ordered ``[env, step]``.
        writers: (name, first step), oldest first.
    """

    layout: RecordLayout
    num_envs: int
    segment_steps: int
    writers: tuple[tuple[str, int], ...] = ()

    @property
    def step_bytes(self) -> int:
        """Bytes of one time step of all environments."""
        return self.num_envs * self.layout.record_bytes

    @property
    def segment_bytes(self) -> int:
        """Bytes per file."""
        return self.segment_steps * self.step_bytes

    def with_writer(self, step: int) -> tuple[Journal, str]:
        """A copy with a new writer that begins at ``step``, and the writer's name."""
        name = uuid.uuid4().hex
        return replace(self, writers=(*self.writers, (name, step))), name

    def overwritten(self, name: str, steps: int) -> str | None:
        """Why the first ``steps`` of a writer are lost, as the end of a sentence; ``None`` if they are not."""
        names = [writer for writer, _ in self.writers]
        if name not in names:
            return "they belong to another run"
        later = [first for _, first in self.writers[names.index(name) + 1 :]]
        if later and min(later) < steps:
            return f"they were overwritten from step {min(later)} on"
        return None

    def save(self, folder: Path) -> None:
        """Write the journal into a folder.

        Raises:
            StorageFault: if it cannot be written.
        """
        content = {
            "schema_version": SCHEMA_VERSION,
            "num_envs": self.num_envs,
            "segment_steps": self.segment_steps,
            "record_bytes": self.layout.record_bytes,
            "record": self.layout.describe(),
            "segment": "[env, step, record]",
            "writers": [{"name": name, "first_step": step} for name, step in self.writers],
        }
        path = folder / _JOURNAL_NAME
        with storage_faults(path, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """Read the journal of a folder; ``None`` if there is none.

        Raises:
            StorageFault: if it cannot be read or has another version.
        """
        path = folder / _JOURNAL_NAME
        if not path.exists():
            return None
        with storage_faults(path, "read"):
            text = path.read_bytes()
        try:
            content: dict[str, Any] = json.loads(text.decode("utf-8"))
            if content["schema_version"] == SCHEMA_VERSION:
                writers = tuple((entry["name"], int(entry["first_step"])) for entry in content["writers"])
                layout = RecordLayout.described(content["record"])
                return cls(layout, int(content["num_envs"]), int(content["segment_steps"]), writers)
        except (ValueError, KeyError, TypeError) as error:
            raise StorageFault(f"{path} is damaged ({type(error).__name__}: {error}); {_REMEDY}.") from error
        version = content["schema_version"]
        raise StorageFault(
            f"{path} has schema version {version} and this release of pwm_torchrl reads version {SCHEMA_VERSION}; "
            f"{_REMEDY}."
        )


_REMEDY = "restore it, or delete the folder and start the run again without resume"


# Segment files: numbered, of equal size, allocated before use ---------------------------------------------------------


_NAME = "segment_{:06d}.bin"
_PATTERN = "segment_*.bin"


class SegmentFiles:
    """Files ``segment_000000.bin``, ``segment_000001.bin`` ... of a folder.

    A file that is not complete counts as missing. The files are read with file calls instead of memory mappings: this
    is as fast (both take 2 ms for 1024 slices of 5 KB in the page cache), an I/O error is an exception instead of a
    signal, and the pages count as page cache instead of this process's memory.

    Args:
        folder (Path): the folder; created with the first file.
        size (int): bytes per file.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._open: dict[int, int] = {}
        self._unsynced: set[int] = set()
        self._unneeded = Unneeded(warn)
        weakref.finalize(self, _close_all, self._open)

    def path(self, number: int) -> Path:
        """Path of a file."""
        return self.folder / _NAME.format(number)

    def exists(self, number: int) -> bool:
        """Whether a file exists and is complete."""
        try:
            return self.path(number).stat().st_size == self.size
        except FileNotFoundError:
            return False

    def numbers(self) -> list[int]:
        """Numbers of all existing files, complete or not."""
        return sorted(_number(path) for path in self.folder.glob(_PATTERN))

    def held_bytes(self) -> int:
        """Bytes of all existing files."""
        return held_bytes(self.folder)

    def create(self, number: int) -> None:
        """Allocate a file unless it exists.

        Raises:
            StorageFault: if the disk has too little space.
        """
        if self.exists(number):
            return
        path = self.path(number)
        self._close(number)
        with storage_faults(path, "allocate the replay file", self.size):
            self.folder.mkdir(parents=True, exist_ok=True)
            allocate(path, self.size)
        self._unsynced.add(number)

    def write(self, number: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Write pieces at their offsets.

        Raises:
            StorageFault: if the file is missing or cannot be written.
        """
        descriptor = self._descriptor(number)
        self._unsynced.add(number)
        with storage_faults(self.path(number), "write the replay file"):
            for offset, data in pieces:
                write_all(descriptor, data, offset)

    def read(self, pieces: Sequence[tuple[int, int, int, int]], into: memoryview) -> None:
        """Read pieces (file, offset, bytes, offset in ``into``).

        Raises:
            StorageFault: if a file is missing, short or cannot be read.
        """
        descriptors = {number: self._descriptor(number) for number in {piece[0] for piece in pieces}}
        number = -1
        try:
            if hasattr(os, "posix_fadvise"):
                # Request all pieces in advance, because a disk serves many parallel requests in the time of a few.
                for number, offset, count, _ in pieces:
                    os.posix_fadvise(descriptors[number], offset, count, os.POSIX_FADV_WILLNEED)
            for number, offset, count, place in pieces:
                if os.preadv(descriptors[number], [into[place : place + count]], offset) != count:
                    raise StorageFault(self.missing(number))
        except OSError:
            with storage_faults(self.path(number), "read the replay file"):
                raise

    def checksums(self, number: int, parts: Iterable[tuple[int, int]]) -> list[int]:
        """CRC-32 of parts of a file, (offset, bytes) each.

        Raises:
            StorageFault: if the file cannot be read.
        """
        found = []
        with storage_faults(self.path(number), "read the replay file"), self.path(number).open("rb") as file:
            for offset, count in parts:
                file.seek(offset)
                value = 0
                for start in range(0, count, _AT_ONCE):
                    value = zlib.crc32(file.read(min(_AT_ONCE, count - start)), value)
                found.append(value)
        return found

    def damaged(self, number: int) -> str:
        """Error message for a file whose content is not what was written."""
        return (
            f"The replay file {self.path(number)} ({amount(self.size)}) is damaged: its checksum is not that of what "
            "was written; restore it, or start the run again without resume."
        )

    def sync(self) -> None:
        """Flush everything written to the disk.

        Raises:
            StorageFault: if it cannot be written.
        """
        if not self._unsynced:
            return
        for number in sorted(self._unsynced):
            with storage_faults(self.path(number), "write the replay file"):
                os.fsync(self._descriptor(number))
        with storage_faults(self.folder, "write the folder"):
            sync_folder(self.folder)
        self._unsynced.clear()

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete files.

        Raises:
            StorageFault: if one cannot be deleted.
        """
        for number in numbers:
            self._close(number)
            self._unsynced.discard(number)
            with storage_faults(self.path(number), "delete the replay file"):
                self.path(number).unlink(missing_ok=True)

    def discard(self, numbers: Iterable[int]) -> None:
        """Delete files that are no longer read; warn once about files that cannot be deleted, which may be retried."""
        for number in numbers:
            self._close(number)
            self._unsynced.discard(number)
            self._unneeded.delete(self.path(number), lambda path: path.unlink(missing_ok=True))

    def close_before(self, number: int) -> None:
        """Close the files before this one; they are reopened when they are read."""
        for each in [n for n in self._open if n < number and n not in self._unsynced]:
            self._close(each)

    def missing(self, number: int) -> str:
        """Error message for a file that is missing or incomplete."""
        path = self.path(number)
        state = f"has {path.stat().st_size:,} of its {self.size:,} bytes" if path.exists() else "is missing"
        return (
            f"The replay file {path} ({amount(self.size)}) {state}; restore it, or start the run again without resume."
        )

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if not self.exists(number):
                raise StorageFault(self.missing(number))
            with storage_faults(self.path(number), "open the replay file"):
                descriptor = os.open(self.path(number), os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            if hasattr(os, "posix_fadvise"):
                # No read-ahead: slices are scattered, so the data after a slice are not needed.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._open[number] = descriptor
        return self._open[number]

    def _close(self, number: int) -> None:
        descriptor = self._open.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)


#: Bytes per read while a checksum is computed.
_AT_ONCE = 2**22


def held_bytes(folder: Path) -> int:
    """Bytes of a folder's segment files."""
    return sum(path.stat().st_size for path in folder.glob(_PATTERN))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


# Checksums of the segments, saved in checkpoints ----------------------------------------------------------------------


class Checksum:
    """CRC-32 of a segment's steps, updated while they are written.

    The steps of an environment are written in order, so one checksum per environment can be updated incrementally.

    Args:
        first (int): the first step in the segment that is included; earlier steps were not written.
        rows (list of int): CRC-32 of each environment's steps.
    """

    def __init__(self, first: int, rows: list[int]) -> None:
        self.first = first
        self.rows = rows

    def add(self, env: int, steps: memoryview) -> None:
        """Update the checksum of an environment with its next steps."""
        self.rows[env] = zlib.crc32(steps, self.rows[env])

    @property
    def value(self) -> int:
        """One number for all environments."""
        return zlib.crc32(struct.pack(f"<{len(self.rows)}I", *self.rows))


# Append-only store of segments, whose newest steps can be sampled -----------------------------------------------------


class SegmentStore:
    """Steps of N environments in files that are written once.

    A ring buffer on disk would overwrite data that the last checkpoint needs. Here, time steps are numbered from the
    beginning of the run, and step t is always in segment t // S. A checkpoint is a number of steps, which are flushed
    to the disk before it is published; resuming continues at that number. Segments that neither a checkpoint nor
    sampling needs are deleted.

    Within a segment, records are ordered ``[env, step]``, so a slice of one environment is one contiguous read and a
    batch ``[N, T]`` is N contiguous writes. Data are written into files that were allocated before, so a full disk
    raises an exception before any part of a batch can be sampled. The pages are page cache, not memory of the process.

    A checkpoint contains a checksum of every segment. Loading it verifies the segments, which reads them once, as
    loading a replay in memory does. Sampling verifies nothing.

    This is not a :class:`~torchrl.data.replay_buffers.Storage`, because a TorchRL writer chooses and reuses slots of a
    ring, and a storage is saved by copying it. This store avoids both.

    Args:
        folder (Path): folder of the files; created with the first batch.
        capacity (int): number of newest time steps that can be sampled.
        num_envs (int): ``N``.
        horizon (int): steps per slice.
        segment_steps (int, optional): ``S``. Defaults to ``None``: depends on the capacity, see
            :func:`pwm_torchrl.memory.storage.segment_steps`.
        since_checkpoint_steps (int): maximum number of time steps written since the oldest checkpoint kept, which need
            disk space in addition to the capacity. Defaults to ``0``.
    """

    def __init__(
        self,
        folder: Path,
        capacity: int,
        num_envs: int,
        horizon: int,
        segment_steps: int | None = None,
        since_checkpoint_steps: int = 0,
    ) -> None:
        self.folder = folder
        self.capacity = capacity
        self.num_envs = num_envs
        self.horizon = horizon
        self.since_checkpoint_steps = since_checkpoint_steps
        self._segment_steps = segment_steps
        self._reset()

    def _reset(self) -> None:
        self.steps = 0  # total number of time steps written
        self._writer: str | None = None  # name of the writer of the newest step
        self._begun = False  # whether this object has written
        self._protected: int | None = None  # steps at the oldest checkpoint kept, None if there is none
        self._journal: Journal | None = None
        self._files: SegmentFiles | None = None
        self._sums: dict[int, Checksum] = {}  # by segment; none for those of an earlier version

    @property
    def filled(self) -> int:
        """Number of time steps that can be sampled."""
        return min(self.steps, self.capacity)

    @property
    def oldest(self) -> int:
        """Number of the oldest time step that can be sampled."""
        return self.steps - self.filled

    def extend(self, batch: TensorDictBase) -> None:
        """Add a batch ``[N, T]``; if this fails, the store is unchanged.

        Raises:
            StorageFault: if it cannot be written.
            ConfigurationError: if its entries differ in shape or type from those of earlier steps.
        """
        layout = RecordLayout.of(batch)
        if self._journal is not None and layout != self._journal.layout:
            raise ConfigurationError(
                f"The replay in {self.folder} holds {self._journal.layout.describe()}; this batch has "
                f"{layout.describe()}."
            )
        if not self._begun:
            self._begin(layout)
        journal, files = self._opened()
        records = layout.pack(batch)
        segment = journal.segment_steps
        end = self.steps + batch.shape[1]
        touched = range(self.steps // segment, -(-end // segment))
        if not all(files.exists(number) for number in touched):
            self._remove_unreachable()
            for number in touched:
                files.create(number)
        for number in touched:
            files.write(number, self._pieces(records, number))
        if end // segment > self.steps // segment:
            # Flush the finished segment now, so that the next checkpoint has at most one segment to flush.
            files.sync()
        self._count(records, touched)
        self.steps = end
        files.close_before(self.oldest // segment)

    def _pieces(self, records: Tensor, number: int) -> Iterator[tuple[int, memoryview]]:
        """The part of a batch that belongs to a segment, as (offset in the segment, bytes) for each environment."""
        journal, _ = self._opened()
        size = journal.layout.record_bytes
        first = number * journal.segment_steps
        start = max(self.steps, first)
        stop = min(self.steps + records.shape[1], first + journal.segment_steps)
        for env, part in enumerate(records[:, start - self.steps : stop - self.steps]):
            yield (env * journal.segment_steps + start - first) * size, part.numpy().data.cast("B")

    def _count(self, records: Tensor, touched: Iterable[int]) -> None:
        """Update the checksums with a batch that was written."""
        journal, _ = self._opened()
        for number in touched:
            start = max(0, self.steps - number * journal.segment_steps)
            if start == 0 or number not in self._sums:
                self._sums[number] = Checksum(start, [0] * self.num_envs)
            for env, (_, data) in enumerate(self._pieces(records, number)):
                self._sums[number].add(env, data)

    def end_episodes(self) -> None:
        """Mark the newest step of every environment as the last of its episode.

        Raises:
            StorageFault: if it cannot be written.
        """
        if self.steps:
            self._write_done(torch.ones_like(self._newest_done()))

    def _newest_done(self) -> Tensor:
        """The flags ``[N, 1]`` of the newest step."""
        env = torch.arange(self.num_envs)
        return self.get(torch.full_like(env, self.steps - 1), env, 1)["next", "done"].squeeze(1)

    def _write_done(self, flags: Tensor) -> None:
        journal, files = self._opened()
        number, row = divmod(self.steps - 1, journal.segment_steps)
        size, start = journal.layout.record_bytes, journal.layout.fields["next", "done"].start
        rows = (env * journal.segment_steps + row for env in range(self.num_envs))
        files.write(number, [(each * size + start, flag.numpy().data.cast("B")) for each, flag in zip(rows, flags)])
        if number in self._sums:
            self._sums[number] = self._checksum(number, self._sums[number].first)

    def _checksum(self, number: int, first: int) -> Checksum:
        """The checksum of a segment on the disk, from its step ``first``."""
        journal, files = self._opened()
        size, segment = journal.layout.record_bytes, journal.segment_steps
        count = min(segment, self.steps - number * segment) - first
        parts = (((env * segment + first) * size, count * size) for env in range(self.num_envs))
        return Checksum(first, files.checksums(number, parts))

    def begin_at(self, step: int) -> None:
        """Start at a step, as if earlier steps had been written and deleted; for data from another storage."""
        self._reset()
        self.steps = step

    def _begin(self, layout: RecordLayout) -> None:
        """Register as a writer before the first batch; empties the folder unless a checkpoint was loaded."""
        self.require_space(layout.record_bytes)
        journal, files, first = self._journal, self._files, self.steps
        if journal is None or files is None:
            step_bytes = self.num_envs * layout.record_bytes
            size = self._segment_steps or segment_steps(self.capacity, step_bytes)
            journal = Journal(layout, self.num_envs, size)
            files = SegmentFiles(self.folder, journal.segment_bytes)
            files.remove(files.numbers())
            first = 0
        # Record the new writer before it overwrites any data.
        journal, writer = journal.with_writer(first)
        journal.save(self.folder)
        self._journal, self._files, self._writer, self._begun = journal, files, writer, True

    def _opened(self) -> tuple[Journal, SegmentFiles]:
        if self._journal is None or self._files is None:
            raise RuntimeError("The replay is empty.")
        return self._journal, self._files

    def require_space(self, record_bytes: int) -> None:
        """Check that the disk has enough space for the capacity and the steps between checkpoints.

        Args:
            record_bytes (int): bytes of one transition.

        Raises:
            StorageFault: if it has not.
        """
        step_bytes = self.num_envs * record_bytes
        segment = self._journal.segment_steps if self._journal else self._segment_steps
        needed = disk_bytes(self.capacity, step_bytes, self.since_checkpoint_steps, segment)
        held = held_bytes(self.folder)
        free = free_bytes(self.folder)
        if needed > held + free:
            more = f" more than the {amount(held)} that it has" if held else ""
            raise StorageFault(
                f"The replay in {self.folder} needs {amount(needed - held)}{more} (training.replay_capacity="
                f"{self.capacity * self.num_envs} transitions of {record_bytes} bytes, and "
                f"{self.since_checkpoint_steps} time steps between checkpoints), but only {amount(free)} are free; "
                "free space there, choose another run_dir, or lower training.replay_capacity."
            )

    def release(self, kept: int | None) -> None:
        """Delete segments that neither sampling nor a checkpoint needs.

        Args:
            kept (int, optional): time steps at the oldest checkpoint that can be resumed; ``None`` if there is none.
        """
        self._protected = kept
        self._remove_unreachable()

    def _remove_unreachable(self) -> None:
        if self._journal is None or self._files is None:
            return
        kept = self.steps if self._protected is None else min(self._protected, self.steps)
        reachable = max(0, kept - self.capacity) // self._journal.segment_steps
        self._files.discard(number for number in self._files.numbers() if number < reachable)
        self._sums = {number: each for number, each in self._sums.items() if number >= reachable}

    def slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        age, env = draw_starts(count, self.horizon, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, self.horizon)

    def observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        age, env = draw_starts(count, 1, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, 1).get("observation").squeeze(1)

    def get(self, time: Tensor, env: Tensor, length: int) -> TensorDict:
        """Read slices of consecutive steps.

        Args:
            time (Tensor): number of each slice's first step, int64 ``[B]``.
            env (Tensor): environment of each slice, int64 ``[B]``.
            length (int): steps per slice.

        Returns:
            TensorDict: ``[B, length]``, a copy.

        Raises:
            StorageFault: if a file is missing, short or cannot be read.
        """
        journal, files = self._opened()
        size, segment = journal.layout.record_bytes, journal.segment_steps
        # Split slices at segment boundaries: [B, 1] is broadcast against [maximum number of parts of a slice].
        time, env, row = (x.unsqueeze(1) for x in (time, env, torch.arange(len(time))))
        number = time // segment + torch.arange((length - 1) // segment + 2)
        start = torch.maximum(time, number * segment)
        stop = torch.minimum(time + length, (number + 1) * segment)
        offset = (env * segment + start - number * segment) * size
        place = (row * length + start - time) * size
        parts = torch.stack([number, offset, (stop - start) * size, place], -1)
        records = torch.empty(len(time), length, size, dtype=torch.uint8)
        files.read(parts[start < stop].tolist(), records.numpy().data.cast("B"))
        return journal.layout.unpack(records)

    def state_dict(self) -> dict[str, Any]:
        """The writer and the number of steps, after flushing them to the disk; the data are not copied.

        Raises:
            StorageFault: if they cannot be flushed.
        """
        if self._files is not None:
            self._files.sync()
        needed = self.oldest // self._journal.segment_steps if self._journal else 0
        sums = [(number, each.first, each.value) for number, each in self._sums.items() if number >= needed]
        return {
            "steps": self.steps,
            "envs": self.num_envs,
            "filled": self.filled,
            "writer": self._writer,
            # Saved because end_episodes may overwrite them later.
            "done": self._newest_done() if self.steps else None,
            # [segments, 3]: number, first step in it, checksum up to the newest step.
            "checksums": torch.tensor(sums, dtype=torch.int64).reshape(-1, 3),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, read_only: bool = False) -> None:
        """Continue from :meth:`state_dict`. Nothing is deleted until :meth:`release` is called.

        Args:
            state_dict (dict): the saved state.

        Keyword Args:
            read_only (bool): do not change the files, because they belong to a run that may still be active. If that
                run has called :meth:`end_episodes` after the checkpoint, the newest step is then also an episode's end
                here. Defaults to ``False``.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
            StorageFault: if its data no longer exist, or are damaged.
        """
        steps, envs, filled = state_dict["steps"], state_dict["envs"], state_dict["filled"]
        if not steps:
            self._reset()
            return
        refuse_other_shape(filled, envs, steps, self.num_envs, self.capacity)
        journal = Journal.load(self.folder)
        lost = "they do not exist" if journal is None else journal.overwritten(state_dict["writer"], steps)
        if journal is None or lost:
            raise StorageFault(
                f"The checkpoint needs steps {steps - filled} to {steps} of the replay in {self.folder}, but {lost}; "
                "resume from another checkpoint, or start the run again without resume."
            )
        files = SegmentFiles(self.folder, journal.segment_bytes)
        segment = journal.segment_steps
        for number in range((steps - filled) // segment, -(-steps // segment)):
            if not files.exists(number):
                raise StorageFault(files.missing(number))
        self._reset()
        self.steps, self._writer, self._protected = steps, state_dict["writer"], 0
        self._journal, self._files = journal, files
        sums = state_dict.get("checksums")
        if not torch.equal(self._newest_done(), state_dict["done"]):
            if not read_only:
                self._write_done(state_dict["done"])
            elif sums is not None:
                sums = sums[sums[:, 0] != (steps - 1) // segment]
        try:
            self._compare(sums)
        except StorageFault:
            self._reset()
            raise

    def _compare(self, saved: Tensor | None) -> None:
        """Compare the segments with a checkpoint's checksums; checkpoints of earlier versions have none.

        Raises:
            StorageFault: for the first damaged segment.
        """
        journal, files = self._opened()
        for number, first, value in [] if saved is None else saved.tolist():
            self._sums[number] = self._checksum(number, first)
            if self._sums[number].value != value:
                raise StorageFault(files.damaged(number))
        newest = (self.steps - 1) // journal.segment_steps
        if newest not in self._sums:  # written by an earlier version; new steps will be added to it
            self._sums[newest] = self._checksum(newest, 0)
