"""One process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Busy", "locked"]


class Busy(RuntimeError):
    """Another process holds the lock; the message names it as far as it is known."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the kernel gives back when the process ends, however it ends.

    Args:
        path (Path): the lock's file; it is made if needed, and stays.

    Keyword Args:
        wait (bool): wait for whoever holds it. Defaults to ``False``.

    Raises:
        Busy: if another process holds it and ``wait`` is off.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            raise Busy(holder or "another process") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
