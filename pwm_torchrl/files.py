"""File operations that survive a full disk or a killed process: atomic writes, appending, allocating, disk errors."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pwm_torchrl.errors import ConfigurationError, StorageFault

#: File systems whose files are RAM.
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
#: Errors by which a file system says that it cannot allocate.
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_MOUNTS = Path("/proc/self/mountinfo")
_ZEROS = bytes(1 << 20)
#: Age in seconds from which a temporary file is taken to be left by a process that was killed.
_ABANDONED_S = 86_400.0


def filesystem_type(path: Path, mountinfo: Path = _MOUNTS) -> str | None:
    """Type of the file system on which a path lies or would lie, such as ``"ext4"``; ``None`` if it is unknown.

    Args:
        path (Path): a file or folder, which need not exist yet.
        mountinfo (Path, optional): the kernel's table of mounts. Defaults to this process's.
    """
    number = existing(path).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    if not mountinfo.exists():
        return None
    for line in mountinfo.read_text(encoding="utf-8").splitlines():
        # 35 31 0:32 /shown /mount/point options ... - type source options
        before, _, after = line.partition(" - ")
        if before.split()[2] == device:
            return after.split()[0]
    return None


def refuse_memory(folder: Path) -> None:
    """Refuse a folder whose files are kept in RAM.

    Raises:
        ConfigurationError: if it lies on a file system in memory.
    """
    kind = filesystem_type(folder)
    if kind in MEMORY_FILESYSTEMS:
        raise ConfigurationError(
            f"training.replay_storage=disk cannot use {folder}: it is on a {kind} file system, which is RAM; put "
            "run_dir on a disk or set training.replay_storage=memory."
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free bytes of a path's file system that this user may use. Quotas are not taken into account."""
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize


def amount(count: int) -> str:
    """A number of bytes as text, such as ``"5.0 MiB"``."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 // 10 else f"{count:,} bytes"


@contextlib.contextmanager
def storage_faults(
    path: Path, doing: str, needed: int | None = None, remedy: str = "resume the run from its last checkpoint"
) -> Iterator[None]:
    """Turn an error of the file system into a :class:`~pwm_torchrl.errors.StorageFault` of one sentence.

    Args:
        path (Path): the file or folder.
        doing (str): the operation, as in "could not <doing>".
        needed (int, optional): bytes that the operation needs. Defaults to ``None``: unknown.
        remedy (str): what to do when the disk works again. Defaults to resuming the run.
    """
    try:
        yield
    except OSError as error:
        try:
            free = f"{amount(free_bytes(path))} are free"
        except OSError:
            free = "the free space is unknown"
        room = free if needed is None else f"{amount(needed)} were needed and {free}"
        if error.errno in _NO_ROOM:
            advice = "free space or raise the quota there"
        else:
            advice = "check the disk or the file server"
        raise StorageFault(
            f"Could not {doing} {path}: {error.strerror or error} ({room}); {advice}, then {remedy}."
        ) from error


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception means that the disk is full, over its quota or broken."""
    return isinstance(error, StorageFault) or (
        isinstance(error, OSError) and error.errno is not None and error.errno in (*_NO_ROOM, *_BROKEN)
    )


class Unneeded:
    """Deletes files that nothing reads any more. A file that cannot be deleted only takes space: it is reported once.

    The caller tries again later, for example with every checkpoint.

    Args:
        warn (callable): reports a file that could not be deleted.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._told: set[Path] = set()

    def delete(self, path: Path, how: Callable[[Path], object]) -> None:
        """Delete ``path`` with ``how``, which raises OSError where it cannot."""
        try:
            how(path)
        except OSError as error:
            if path not in self._told:
                self._warn(
                    f"{path}, which is no longer needed, could not be deleted ({error.strerror or error}); deletion "
                    "is retried later"
                )
            self._told.add(path)


class Reserve:
    """Reserves disk space so that the summary can be written when the disk is full.

    Args:
        folder (Path): the run directory; the reserved space is the file ``.reserve`` in it.
        size (int): bytes to reserve. Defaults to 256 KiB.
    """

    def __init__(self, folder: Path, size: int = 1 << 18) -> None:
        self.path = folder / ".reserve"
        self.size = size

    def take(self) -> None:
        """Reserve the space.

        Raises:
            StorageFault: if the disk has too little.
        """
        with storage_faults(self.path, "reserve space for the run's summary in", self.size):
            allocate(self.path, self.size)

    def free(self) -> None:
        """Free the space, to write the summary or because the run has ended."""
        self.path.unlink(missing_ok=True)


def allocate(path: Path, size: int) -> None:
    """Create a file of ``size`` bytes whose blocks are allocated; an existing file is replaced.

    Raises:
        OSError: if the disk has too little space; no file is left then.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        try:
            if size:
                _take_blocks(descriptor, size)
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink()
        raise


def _take_blocks(descriptor: int, size: int) -> None:
    """Allocate blocks with the file system's own call; write zeros if it has none."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_ALLOCATE:
            raise
        write_zeros(descriptor, size)
    except AttributeError:  # macOS
        write_zeros(descriptor, size)


def write_zeros(descriptor: int, size: int) -> None:
    """Write ``size`` zeros from the beginning of a file."""
    written = 0
    while written < size:
        written += os.pwrite(descriptor, _ZEROS[: size - written], written)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``; a single ``pwrite`` may write only a part of it."""
    while data.nbytes:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, suffix: str = "", sweep: bool = True) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path beside it, which is renamed to ``path`` at the end.

    Readers see the old file or the complete new one. After an exception, the old file is unchanged and the temporary
    file is deleted. Each call has its own temporary file, so processes that write the same file do not mix their
    contents. A killed process leaves its temporary file; the next call for the same path deletes it once it is a day
    old.

    Args:
        path (Path): the file to create or replace. Its folder must exist.

    Keyword Args:
        durable (bool): whether to wait until the file and its name are on the disk. Defaults to ``False``.
        suffix (str): ending of the temporary path, for writers that choose the format by it. Defaults to none.
        sweep (bool): whether to look for temporary files of killed processes. This lists the folder, which takes long
            where there are thousands of files. Defaults to ``True``.

    Yields:
        Path: the temporary path. It does not exist yet; the caller creates it.

    Raises:
        OSError: if the file cannot be written; an error about the temporary path names ``path`` instead.
    """
    if sweep:
        _delete_abandoned(path)
    # A part of the name, since a name that is as long as the file system allows leaves no room for more.
    draft = path.with_name(f".{path.name[:50]}.{os.urandom(6).hex()}.new{suffix}")
    try:
        yield draft
        if durable:
            flush(draft)
        os.replace(draft, path)
    except OSError as error:
        if error.filename2 is None and str(error.filename) == str(draft):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # it would hide the error of the block
            draft.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def _delete_abandoned(path: Path) -> None:
    """Delete old temporary files of :func:`replacing` for this path."""
    with contextlib.suppress(OSError):
        for draft in path.parent.glob(f".{glob.escape(path.name[:50])}.*.new*"):
            if time.time() - draft.stat().st_mtime > _ABANDONED_S:
                draft.unlink()


def write_durably(path: Path, text: str) -> None:
    """Write a text file atomically, and wait until it is on the disk."""
    with replacing(path, durable=True) as draft:
        draft.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: not JSON, or not text
        return {}
    return content if isinstance(content, dict) else {}


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file that has one per line. Other lines are skipped; without a file, the list is empty."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def flush(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder, its files' names, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot flush folders
            raise
    finally:
        os.close(descriptor)


def append_text(file: BinaryIO, text: str) -> None:
    """Append to an unbuffered file that was opened with mode ``"ab"``.

    Raises:
        OSError: if the text cannot be written completely. The file is then truncated to its old length; otherwise a
            resumed run would append its first line to an incomplete one.
    """
    descriptor = file.fileno()
    before = os.fstat(descriptor).st_size
    data = memoryview(text.encode("utf-8"))
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, before)
        raise
