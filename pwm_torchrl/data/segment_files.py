"""Segment files of a replay buffer on disk, and the journal of the runs that wrote them."""

from __future__ import annotations

import json
import os
import uuid
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pwm_torchrl.data.layout import RecordLayout
from pwm_torchrl.errors import StorageFault
from pwm_torchrl.files import Unneeded, allocate, amount, storage_faults, sync_folder, write_all, write_durably
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
