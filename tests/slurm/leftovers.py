"""Processes of throw-away clusters, found by their environment, and what is left of those whose tests were killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

from slurm_files import CGROUPS

OWNER = "PWM_TORCHRL_TEST_SLURM_OWNER"  # in the environment of the daemons and of every job: the tests' process
PREFIX = "pwm_slurm_"  # of the clusters' folders in /tmp; the owner follows
_PR_SET_PDEATHSIG = 1


def identity(pid: int) -> str:
    """Names a process for as long as the machine runs: numbers come back, with another start."""
    stat = _stat(pid)
    return f"{pid}-{stat[19]}" if stat else ""


def parent(pid: int) -> int:
    """Number of a process's parent, 0 without the process."""
    stat = _stat(pid)
    return int(stat[1]) if stat else 0


def command_line(pid: int) -> str:
    """Program and arguments, with null bytes between."""
    return _read(pid, "cmdline")


def marked(start: str) -> list[int]:
    """Other processes with an entry in their environment that starts so."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [n for n in numbers if n != os.getpid() and any(each.startswith(start) for each in _environment(n))]


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def die_with_the_tests() -> None:
    """For a new process, before its program: SIGTERM when the process that started it has gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def remove_cgroups(nodes: Iterable[str]) -> None:
    """Removes the groups that the nodes made; they are empty once the jobs have ended."""
    for node in nodes:
        for top in CGROUPS.glob(f"*/slurm_{node}"):
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def stop_orphans() -> None:
    """Stops what clusters of tests that no longer run have left, and removes their files."""
    marker = f"{OWNER}="
    for pid in marked(marker):
        owners = [entry.removeprefix(marker) for entry in _environment(pid) if entry.startswith(marker)]
        if owners and not _lives(owners[0]):
            kill([pid])
    for folder in Path("/tmp").glob(f"{PREFIX}*_*"):
        if not _lives(folder.name.removeprefix(PREFIX).partition("_")[0]):
            remove_cgroups(node.name for node in folder.glob("spool/*"))
            shutil.rmtree(folder, ignore_errors=True)


def _lives(owner: str) -> bool:
    return identity(int(owner.partition("-")[0])) == owner


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` after the name, empty without the process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _environment(pid: int) -> list[str]:
    return _read(pid, "environ").split("\0")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
