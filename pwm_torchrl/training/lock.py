"""One process at a time in a run directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pwm_torchrl.errors import ConfigurationError

LOCK_FILE = "run.lock"


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the operating system lets go when the process ends, however it ends.

    Raises:
        ConfigurationError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing there to lock with
        yield
        return
    with (run_dir / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigurationError(
                f"run_dir={run_dir} is in use by process {file.read().strip() or 'unknown'}; wait for it, stop it, or "
                "give another run_dir."
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
