"""A small disk that tests can fill."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SMALL = 32 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB; the test is skipped if none can be mounted."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = done.stderr.strip()
    except FileNotFoundError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {reason}")
    try:
        yield folder
    finally:
        # Lazily: a failed test's traceback may hold files open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def any_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a replay on disk in RAM, because the small disk is in RAM."""
    monkeypatch.setattr("pwm_torchrl.data.replay.refuse_memory", lambda folder: None)
