"""A real cgroup with a memory limit, for tests that need the kernel's own behaviour."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pwm_torchrl.memory.cgroups import memory_cgroups


@contextlib.contextmanager
def limited_cgroup(limit: int) -> Iterator[Path]:
    """Directory of a new, empty group with a memory limit and without swap, removed afterwards.

    A process joins by writing its process id into the directory's ``cgroup.procs``; it must have ended before the block
    does. The test is skipped where such a group cannot be made.

    Args:
        limit (int): bytes; a multiple of the page size.
    """
    directory = _new_group()
    try:
        _set_limit(directory, limit)
        yield directory
    finally:
        directory.rmdir()


def _new_group() -> Path:
    groups = memory_cgroups()
    parents = [group.path for group in groups]
    if groups and groups[-1].version == 2:
        parents.append(groups[-1].path.parent)  # the root of all groups counts nothing itself
    reason = "no memory cgroups here"
    for parent in parents:
        directory = parent / f"pwm_torchrl_test_{uuid.uuid4().hex}"
        try:
            directory.mkdir()
        except OSError as error:
            reason = f"cannot make a cgroup: {error}"
            continue
        if any((directory / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            return directory
        # Version 2: no memory controller below a group that has processes of its own.
        directory.rmdir()
        reason = f"{parent} passes no memory controller on"
    pytest.skip(reason)


def _set_limit(directory: Path, limit: int) -> None:
    """With swap, a leak would go there instead of meeting the limit; version 1 limits the sum."""
    unified = (directory / "memory.max").exists()
    limit_file, swap_file, swap = (
        ("memory.max", "memory.swap.max", 0)
        if unified
        else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit)
    )
    try:
        (directory / limit_file).write_text(str(limit))
        if (directory / swap_file).exists():
            (directory / swap_file).write_text(str(swap))
        elif len(Path("/proc/swaps").read_text().splitlines()) > 1:
            pytest.skip("this machine swaps, and its cgroups do not limit that")
    except PermissionError as error:
        pytest.skip(f"cannot limit memory in {directory}: {error}")
