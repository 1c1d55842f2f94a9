"""Who owns a run, and whether that owner still runs: asked of SLURM or of the process table, never of a file's age."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ALIVE, ENDED, UNKNOWN = "alive", "ended", "unknown"
#: Seconds that SLURM has for an answer.
QUERY_TIMEOUT_S = 20
#: States in which processes of a job may exist.
WITH_PROCESSES = (
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"
)  # fmt: skip
_PROC = Path("/proc")


@dataclass(frozen=True)
class Identity:
    """A process, as far as it can be recognised later and from elsewhere.

    Attributes:
        job_id (str, optional): of the SLURM job, ``123``, or ``123_4`` in an array; ``None`` outside of SLURM.
        restart_count (int): how often SLURM has requeued that job.
        host (str): name of the machine.
        boot_id (str, optional): the kernel's name for the machine's present uptime.
        pid (int): process id.
        pid_namespace (str, optional): where that id holds; containers have their own.
        started (int, optional): the process's start, clock ticks since the machine's: ids are used again.
    """

    job_id: str | None
    restart_count: int
    host: str
    boot_id: str | None
    pid: int
    pid_namespace: str | None
    started: int | None

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Identity:
        """This process."""
        environ = os.environ if environ is None else environ
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            slurm_job_id(environ),
            int(restarts) if restarts.isdigit() else 0,
            socket.gethostname(),
            _boot_id(),
            os.getpid(),
            _pid_namespace(),
            _started(os.getpid()),
        )


def slurm_job_id(environ: Mapping[str, str] | None = None) -> str | None:
    """Id of the SLURM job that this process belongs to; ``None`` outside of one."""
    environ = os.environ if environ is None else environ
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environ.get("SLURM_JOB_ID") or None


def owner_state(owner: Identity, here: Identity | None = None, ask_slurm: Callable[[str], str] | None = None) -> str:
    """Whether an owner still runs.

    Args:
        owner (Identity): the process asked about.
        here (Identity, optional): the process that asks. Defaults to ``None``: this one.
        ask_slurm (callable, optional): whether processes of a job may exist, by its id. Defaults to ``None``:
            :func:`slurm_state`.

    Returns:
        str: ``"alive"``, ``"ended"``, or ``"unknown"`` if neither can be told.
    """
    here = Identity.here() if here is None else here
    same_machine = owner.host == here.host and owner.boot_id == here.boot_id
    if same_machine and owner.pid_namespace == here.pid_namespace:
        return ALIVE if _same_process(owner) else ENDED
    if owner.job_id is not None:
        if owner.job_id == here.job_id and owner.restart_count < here.restart_count:
            return ENDED  # SLURM requeues a job when nothing of it runs any more
        return (ask_slurm or slurm_state)(owner.job_id)
    if owner.host == here.host and not same_machine:
        return ENDED  # the machine was started again since
    return UNKNOWN


def slurm_state(job_id: str) -> str:
    """Whether processes of a SLURM job may exist; ``"unknown"`` without SLURM or its answer."""
    if shutil.which("squeue") is None:
        return UNKNOWN
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    if answer.returncode != 0:
        # What SLURM has forgotten has ended; any other error says nothing.
        return ENDED if "Invalid job id" in answer.stderr else UNKNOWN
    states = answer.stdout.split()
    return ALIVE if any(state in WITH_PROCESSES for state in states) else ENDED


def describe(owner: Identity) -> str:
    """An owner in words."""
    job = "" if owner.job_id is None else f"SLURM job {owner.job_id}, "
    return f"{job}process {owner.pid} on {owner.host}"


def _same_process(owner: Identity) -> bool:
    started = _started(owner.pid)
    if started is None and not _PROC.is_dir():  # a system that does not tell: whoever has the id now
        try:
            os.kill(owner.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return started is not None and owner.started in (None, started)


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks, ``None`` if there is none, or none but its entry in the table is left."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str | None:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return None
