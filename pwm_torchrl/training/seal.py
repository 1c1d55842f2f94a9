"""Sealing a finished folder: its files reach the disk, then a list of their sizes and checksums, written last."""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pwm_torchrl.data.files import sync_folder, write_durably

SEAL_FILE = "checksums.json"
_BLOCK = 1 << 22
#: Flushes that wait together cost a journalling file system little more than one.
_FLUSHES = 8


class BrokenSeal(RuntimeError):
    """A file of a sealed folder is missing, or is not what was sealed."""


def seal(folder: Path) -> None:
    """Flush a folder's files to the disk and list them.

    Raises:
        OSError: if the disk does not take them.
    """
    files = _files(folder)
    with ThreadPoolExecutor(_FLUSHES) as pool:
        checksums = list(pool.map(_flushed, files))
    for inner in {file.parent for file in files}:
        sync_folder(inner)
    listed = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": checksum}
        for file, checksum in zip(files, checksums, strict=True)
    }
    body = json.dumps(listed, sort_keys=True)
    content = {"files": listed, "crc32": zlib.crc32(body.encode())}
    write_durably(folder / SEAL_FILE, json.dumps(content, indent=1) + "\n")


def check_seal(folder: Path) -> None:
    """Compare a folder's files with its seal.

    Raises:
        BrokenSeal: if there is none, or a file differs; the message is the end of a sentence.
    """
    try:
        content = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        listed = content["files"]
        intact = zlib.crc32(json.dumps(listed, sort_keys=True).encode()) == content["crc32"]
    except FileNotFoundError as error:
        raise BrokenSeal(f"it has no {SEAL_FILE}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenSeal(f"its {SEAL_FILE} is damaged") from error
    if not intact:
        raise BrokenSeal(f"its {SEAL_FILE} is damaged")
    for name, facts in listed.items():
        file = folder / name
        if not file.is_file():
            raise BrokenSeal(f"its file {name} is missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise BrokenSeal(f"its file {name} has {size} of {facts['bytes']} bytes")
        if _checksum(file) != facts["crc32"]:
            raise BrokenSeal(f"its file {name} does not have its checksum")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL_FILE)


def _flushed(file: Path) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _checksum(file)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
