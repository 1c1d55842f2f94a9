"""What episodes are read from: files that are hashed once and give their episodes in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pwm_torchrl.data.episodes.rows import BadEpisodes, EpisodeRows
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["Advance", "Source", "find_files", "hash_file"]

#: Called with the number of bytes read since the last call.
Advance = Callable[[int], None]
_BLOCK = 1 << 22


class Source(Protocol):
    """One file, or data set, whose episodes enter a store together or not at all.

    Attributes:
        name (str): unique in its folder; the manifest knows it by this.
        size (int): bytes.
    """

    name: str
    size: int

    def check(self, tasks: TaskSet) -> int:
        """Look at what can be told without reading the data.

        Returns:
            int: rows that a store needs for it, as far as they are known now.

        Raises:
            BadEpisodes: if it cannot be read or has another layout.
        """

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the content, after whatever checksums it carries itself have been verified.

        Raises:
            BadEpisodes: if a checksum does not agree.
        """

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Its episodes, checked.

        Raises:
            BadEpisodes: at the first that cannot go into a store.
        """


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of a folder, or the one file given, in the order of their names; numbers in names count as numbers.

    Raises:
        ConfigurationError: if there is none.
    """
    wanted = ", ".join(f"*{suffix}" for suffix in suffixes)
    if folder.is_file():
        if folder.suffix not in suffixes:
            raise ConfigurationError(f"{folder} is no file of episodes; {wanted} are read")
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
        advance (callable): is told of the progress.
        also (iterable of callable, optional): are shown every block with its offset. Defaults to none.

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
