"""A store's copy on a node's own disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from pwm_torchrl.data.episodes import store as layout
from pwm_torchrl.data.episodes.store import EpisodeStore
from pwm_torchrl.data.episodes.writer import locked
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import amount, free_bytes, storage_faults, sync_folder

__all__ = ["stage_store"]

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
