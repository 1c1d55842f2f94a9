"""Sources of episodes for an import, and TD-MPC2's chunk files.

A file is memory-mapped and copied in blocks whose pages are released, so memory use does not depend on its size. No
code in a file is executed: the unpickler only accepts tensors, and a class that keeps the stored state of a TensorDict.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows, check_rows
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "Advance",
    "ChunkFile",
    "Source",
    "find_files",
    "hash_file",
]

# Interface of sources -------------------------------------------------------------------------------------------------


#: Progress callback; called with the number of bytes read since the last call.
Advance = Callable[[int], None]
_BLOCK = 1 << 22


class Source(Protocol):
    """A file or data set whose episodes are imported together or not at all.

    Attributes:
        name (str): unique name, used in the manifest.
        size (int): size in bytes.
    """

    name: str
    size: int

    def check(self, tasks: TaskSet) -> int:
        """Check everything that does not require reading the data.

        Returns:
            int: number of rows for a store, possibly an estimate.

        Raises:
            BadEpisodes: if it cannot be read or has another layout.
        """

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the content; also verifies checksums that the source itself contains.

        Raises:
            BadEpisodes: if a checksum is wrong.
        """

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Yield checked episodes.

        Raises:
            BadEpisodes: at the first episode that cannot be imported.
        """


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of a folder, or a single given file, sorted by name with numbers compared as numbers.

    Raises:
        ConfigurationError: if there are no files.
    """
    wanted = ", ".join(f"*{suffix}" for suffix in suffixes)
    if folder.is_file():
        if folder.suffix not in suffixes:
            raise ConfigurationError(f"{folder} is not a file of episodes ({wanted})")
        return [folder]
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder or file {folder} to read episodes from")
    found = [path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith(".")]
    if not found:
        raise ConfigurationError(f"the folder {folder} has no file of episodes ({wanted})")
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key: ``chunk_2`` before ``chunk_10``."""
    parts: list[tuple[int, str]] = []
    for character in name:
        if character.isdecimal() and parts and parts[-1][1] == "":
            parts[-1] = (10 * parts[-1][0] + int(character), "")
        else:
            parts.append((int(character), "") if character.isdecimal() else (-1, character))
    return tuple(parts)


def hash_file(path: Path, advance: Advance, also: Iterable[Callable[[int, memoryview], None]] = ()) -> str:
    """SHA-256 of a file.

    Args:
        path (Path): the file.
        advance (callable): progress callback.
        also (iterable of callable, optional): further functions, called with each offset and block. Defaults to none.

    Raises:
        BadEpisodes: if it cannot be read.
    """
    watchers, digest, offset = list(also), hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            block = memoryview(bytearray(_BLOCK))
            while count := file.readinto(block):
                digest.update(block[:count])
                for watcher in watchers:
                    watcher(offset, block[:count])
                offset += count
                advance(count)
    except OSError as error:
        raise BadEpisodes(f"cannot be read: {error.strerror}") from error
    return digest.hexdigest()


# TD-MPC2's published data: ``*.pt`` files that hold a TensorDict of episodes ``[N, T]`` -------------------------------


_BLOCK_BYTES = 32 << 20
_KEYS = ("obs", "action", "reward", "task")


class _Stored:
    """Replaces TensorDict while a file is read; keeps the state written by any version of it."""

    def __init__(self, *state: Any) -> None:
        self.state = state[-1] if state else {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


#: Classes that a file may contain in addition to tensors. Versions of TensorDict differ in module and in how they
#: pickle.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Stored, "tensordict._reductions._make_td"),
    (_Stored, "tensordict._td.TensorDict"),
    (_Stored, "tensordict.tensordict.TensorDict"),
]


class ChunkFile:
    """A chunk file as a source.

    Args:
        path (Path): the file.
        name (str, optional): name of the source. Defaults to ``None``, the file's name.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        self.size = path.stat().st_size

    def check(self, tasks: TaskSet) -> int:
        """Check keys, dtypes and shapes, without reading the data.

        Returns:
            int: number of rows.

        Raises:
            BadEpisodes: if one of them is wrong.
        """
        return int(self._open(tasks)["reward"].numel())

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the file; also verifies the archive's own checksums in the same pass.

        Raises:
            BadEpisodes: if one of them is wrong.
        """
        records = [_Record(self.path, info) for info in self._archive()]
        found = hash_file(self.path, advance, [record.update for record in records])
        for record in records:
            if not record.matches():
                raise BadEpisodes(f"is corrupt: the checksum of its part {record.name} is wrong")
        return found

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Yield episodes in blocks of some tens of MB.

        Raises:
            BadEpisodes: at the first episode that cannot be imported.
        """
        chunk = self._open(tasks)
        episodes, steps = chunk["reward"].shape
        row_bytes = 4 * (tasks.observation_dim + tasks.action_dim + 3)
        count = max(1, _BLOCK_BYTES // (steps * row_bytes))
        for begin in range(0, episodes, count):
            part = {key: value[begin : begin + count] for key, value in chunk.items()}
            rows = _rows(part, begin)
            check_rows(rows, tasks, begin)
            for value in part.values():
                _release_pages(value)
            yield rows

    def _open(self, tasks: TaskSet) -> dict[str, Tensor]:
        """The four tensors, mapped and checked; the reward without a trailing dimension of 1."""
        self._archive()
        try:
            with torch.serialization.safe_globals(_ALLOWED):
                content = torch.load(str(self.path), map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError) as error:
            raise BadEpisodes(f"cannot be loaded: {_first_sentence(error)}") from error
        except pickle.UnpicklingError as error:
            raise BadEpisodes("contains something other than a TensorDict of tensors and is not loaded") from error
        if isinstance(content, _Stored):
            content = content.state.get("_tensordict") if isinstance(content.state, dict) else None
        if not isinstance(content, dict):
            raise BadEpisodes("contains no TensorDict")
        return _checked(content, tasks)

    def _archive(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.infolist()
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise BadEpisodes(
                f"is not a complete file of torch.save ({self.size:,} bytes): it is truncated or of another kind"
            ) from error
        except OSError as error:
            raise BadEpisodes(f"cannot be read: {error.strerror}") from error


def _checked(content: dict[str, Any], tasks: TaskSet) -> dict[str, Tensor]:
    missing = [key for key in _KEYS if not isinstance(content.get(key), Tensor)]
    if missing:
        raise BadEpisodes(f"has no tensor {', '.join(missing)}; it has {', '.join(map(str, content)) or 'nothing'}")
    chunk = {key: content[key] for key in _KEYS}
    if chunk["reward"].ndim == 3 and chunk["reward"].shape[-1] == 1:
        chunk["reward"] = chunk["reward"].squeeze(-1)
    for key, value in chunk.items():
        integer = key == "task"
        if integer and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
            raise BadEpisodes(f"task is {value.dtype} instead of integers")
        if not integer and value.dtype != torch.float32:
            raise BadEpisodes(f"{key} is {value.dtype} instead of torch.float32")
    batch = list(chunk["reward"].shape)
    if len(batch) != 2 or batch[0] < 1 or batch[1] < 2:
        raise BadEpisodes(f"reward has shape {batch} instead of [N, T] with N >= 1 episodes of T >= 2 steps")
    for key, width in (("obs", tasks.observation_dim), ("action", tasks.action_dim)):
        found = list(chunk[key].shape)
        if found[:2] != batch or len(found) != 3:
            raise BadEpisodes(f"{key} has shape {found}, but reward has shape {batch}")
        if found[2] != width:
            raise BadEpisodes(
                f"{key} has {found[2]} columns, but the widest task of the set {tasks.name} has {width}; the task "
                "set or the registry is wrong"
            )
    if list(chunk["task"].shape) != batch:
        raise BadEpisodes(f"task has shape {list(chunk['task'].shape)}, but reward has shape {batch}")
    return chunk


def _rows(part: dict[str, Tensor], first_episode: int) -> EpisodeRows:
    """Convert a block to rows of a store, as a copy."""
    episodes, steps = part["reward"].shape
    values = {key: np.array(value.numpy(), order="C") for key, value in part.items()}
    task = values["task"]
    mixed = np.flatnonzero((task != task[:, :1]).any(1))
    if len(mixed):
        raise BadEpisodes(f"episode {first_episode + mixed[0]} has more than one task index")
    for key in ("action", "reward"):
        filler = values[key][:, 0].reshape(episodes, -1)
        real = np.flatnonzero(~(np.isnan(filler) | (filler == 0)).all(1))
        if len(real):
            raise BadEpisodes(
                f"episode {first_episode + real[0]}: {key} at index 0 must be NaN, because it belongs to no "
                "transition; are actions and rewards shifted by one?"
            )
    return EpisodeRows(
        values["obs"].reshape(episodes * steps, -1),
        values["action"].reshape(episodes * steps, -1),
        values["reward"].reshape(-1),
        np.full(episodes, steps - 1, dtype=np.int64),
        task[:, 0].astype(np.int64),
    )


class _Record:
    """A part of a zip archive; its CRC-32 is computed while the file is read."""

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        self.name = info.filename
        self.expected = info.CRC
        with path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        self.begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        self.begin += int.from_bytes(header[28:30], "little")
        self.end = self.begin + info.compress_size
        self.found = 0

    def update(self, offset: int, block: memoryview) -> None:
        begin, end = max(self.begin, offset), min(self.end, offset + len(block))
        if begin < end:
            self.found = zlib.crc32(block[begin - offset : end - offset], self.found)

    def matches(self) -> bool:
        # Zero means no checksum: written with torch.serialization.set_crc32_options(False).
        return self.expected in (0, self.found)


def _release_pages(tensor: Tensor) -> None:
    """Release a mapped tensor's pages; they are read from the file again if they are needed."""
    if sys.platform != "linux" or not tensor.numel():
        return
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    begin = tensor.data_ptr()
    end = begin + (last + 1) * tensor.element_size()
    page = mmap.PAGESIZE
    begin, end = -(-begin // page) * page, end // page * page
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
