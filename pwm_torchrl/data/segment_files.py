"""Numbered files of equal size: allocated before use, written and read through file calls."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from pwm_torchrl.data.files import allocate, amount, storage_faults, sync_folder, write_all
from pwm_torchrl.errors import StorageFault

_NAME = "segment_{:06d}.bin"
_PATTERN = "segment_*.bin"


class SegmentFiles:
    """Files ``segment_000000.bin``, ``segment_000001.bin`` ... of a folder.

    A file is complete or counts as missing. Reading by file calls instead of through a mapping costs no time here (both
    take 2 ms for 1024 slices of 5 KB in the page cache), an I/O error is an exception instead of a signal, and the
    pages count as the kernel's cache instead of as this process's memory.

    Args:
        folder (Path): where they lie; made with the first of them.
        size (int): bytes of each.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._open: dict[int, int] = {}
        self._unsynced: set[int] = set()
        weakref.finalize(self, _close_all, self._open)

    def path(self, number: int) -> Path:
        """Where a file lies."""
        return self.folder / _NAME.format(number)

    def exists(self, number: int) -> bool:
        """Whether a file is there, whole."""
        try:
            return self.path(number).stat().st_size == self.size
        except FileNotFoundError:
            return False

    def numbers(self) -> list[int]:
        """The files that lie there, whole or not."""
        return sorted(_number(path) for path in self.folder.glob(_PATTERN))

    def held_bytes(self) -> int:
        """Bytes of the files that lie there."""
        return held_bytes(self.folder)

    def create(self, number: int) -> None:
        """Make room for a file unless it is there.

        Raises:
            StorageFault: if there is none.
        """
        if self.exists(number):
            return
        path = self.path(number)
        self._close(number)
        with storage_faults(path, "make room for the replay file", self.size):
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
        """Read pieces (file, offset, bytes, place in ``into``).

        Raises:
            StorageFault: if a file is missing, short or cannot be read.
        """
        descriptors = {number: self._descriptor(number) for number in {piece[0] for piece in pieces}}
        number = -1
        try:
            if hasattr(os, "posix_fadvise"):
                # All that is not cached is asked for at once: a disk serves many requests in the time of a few.
                for number, offset, count, _ in pieces:
                    os.posix_fadvise(descriptors[number], offset, count, os.POSIX_FADV_WILLNEED)
            for number, offset, count, place in pieces:
                if os.preadv(descriptors[number], [into[place : place + count]], offset) != count:
                    raise StorageFault(self.missing(number))
        except OSError:
            with storage_faults(self.path(number), "read the replay file"):
                raise

    def sync(self) -> None:
        """Wait until everything written is on the disk.

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

    def close_before(self, number: int) -> None:
        """Close the files before this one; they are opened again if they are read."""
        for each in [n for n in self._open if n < number and n not in self._unsynced]:
            self._close(each)

    def missing(self, number: int) -> str:
        """The sentence about a file that is not whole."""
        path = self.path(number)
        state = f"has {path.stat().st_size:,} of its {self.size:,} bytes" if path.exists() else "is missing"
        return (
            f"The replay file {path} ({amount(self.size)}) {state}; put it back, or start the run again without resume."
        )

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if not self.exists(number):
                raise StorageFault(self.missing(number))
            with storage_faults(self.path(number), "open the replay file"):
                descriptor = os.open(self.path(number), os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            if hasattr(os, "posix_fadvise"):
                # Slices lie scattered: what follows one of them will not be asked for.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._open[number] = descriptor
        return self._open[number]

    def _close(self, number: int) -> None:
        descriptor = self._open.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)


def held_bytes(folder: Path) -> int:
    """Bytes of a folder's segment files."""
    return sum(path.stat().st_size for path in folder.glob(_PATTERN))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
