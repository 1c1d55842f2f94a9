"""Asking SLURM, one command per question; how its answers are read is in :mod:`pwm_torchrl.cluster.parse`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from pwm_torchrl.cluster.parse import (
    SACCT_FIELDS,
    SQUEUE_FORMAT,
    JobState,
    Site,
    parse_config,
    parse_nodes,
    parse_partitions,
    parse_sacct,
    parse_squeue,
    records,
)
from pwm_torchrl.cluster.record import read_job
from pwm_torchrl.errors import ConfigurationError

__all__ = ["SlurmError", "ask", "job_records", "job_states", "live_job", "scontrol", "site", "slurm_available"]

TIMEOUT_S = 20.0
COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_UNKNOWN_JOB = ("Invalid job id", "not found")
_NO_CLUSTER = "configuration source"
_NO_ACCOUNTING = "accounting storage is disabled"


class SlurmError(ConfigurationError):
    """SLURM does not answer, or refuses; one sentence."""


def slurm_available() -> bool:
    """Whether this machine belongs to a SLURM cluster, be its controller up or down.

    Commands alone are not enough: a distribution's packages bring them to machines without a cluster.
    """
    if any(shutil.which(command) is None for command in COMMANDS):
        return False
    try:
        answer = _run(["scontrol", "ping"])
    except SlurmError:
        return True  # somebody was asked, and did not answer in time
    return _NO_CLUSTER not in answer.stderr


def ask(command: Sequence[str]) -> str:
    """Runs one of SLURM's commands.

    Args:
        command (sequence of str): the command and its arguments.

    Returns:
        str: what it wrote.

    Raises:
        SlurmError: if it is not installed, does not answer within 20 seconds or fails.
    """
    answer = _run(command)
    if answer.returncode:
        raise _failure(command, answer.stderr or answer.stdout)
    return answer.stdout


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States of jobs and of tasks of arrays, by one call of ``squeue``, and of ``sacct`` for those it has forgotten.

    Args:
        job_ids (iterable of str): ``12`` or ``12_3``; of an array's number ``12`` its tasks are told.

    Returns:
        dict: by id. What SLURM does not know, or not any more, is left out: without accounting it forgets an ended job
        after some minutes (:attr:`~pwm_torchrl.cluster.parse.SlurmConfig.remembers_s`).

    Raises:
        SlurmError: if SLURM does not answer.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    # A single unknown id is an error to squeue, one among several is not: it is never asked for a single one.
    asked = ",".join(ids if len(ids) > 1 else ids * 2)
    command = ["squeue", "-h", "-r", "-t", "all", "-j", asked, "-o", SQUEUE_FORMAT]
    answer = _run(command)
    if answer.returncode and not any(words in answer.stderr for words in _UNKNOWN_JOB):
        raise _failure(command, answer.stderr)
    found = parse_squeue(answer.stdout)
    known = {*found, *(job_id.partition("_")[0] for job_id in found)}
    forgotten = [job_id for job_id in ids if job_id not in known]
    return {**_remembered(forgotten), **found} if forgotten else found


def live_job(run_dir: Path) -> JobState | None:
    """The newest job of a run that waits, runs or comes back; ``None`` if there is none.

    Raises:
        SlurmError: if SLURM does not answer.
    """
    ids = [str(job_id) for job_id in read_job(run_dir).get("job_ids", [])]
    states = job_states(ids)
    alive = [states[job_id] for job_id in ids if job_id in states and not states[job_id].ended]
    return alive[-1] if alive else None


def job_records(job_id: str) -> list[dict[str, str]]:
    """The controller's record of a job, or of every task of an array.

    Returns:
        list of dict: ``JobState``, ``Reason``, ``Restarts``, ``DerivedExitCode``, ``PreemptTime``, ...; empty if it
        does not know the job (any more).

    Raises:
        SlurmError: if SLURM does not answer.
    """
    # Without --details there is no DerivedExitCode.
    command = ["scontrol", "--oneliner", "--details", "show", "job", job_id]
    answer = _run(command)
    if answer.returncode:
        if any(words in answer.stderr + answer.stdout for words in _UNKNOWN_JOB):
            return []
        raise _failure(command, answer.stderr)
    return records(answer.stdout)


def scontrol(*words: str) -> str | None:
    """Change a job; what SLURM complained about, ``None`` if it did what was asked."""
    try:
        answer = _run(["scontrol", *words])
    except SlurmError as error:
        return str(error)
    return None if answer.returncode == 0 else " ".join(answer.stderr.split())


def site() -> Site:
    """Settings, partitions and nodes, by a call for each.

    Raises:
        SlurmError: if SLURM does not answer.
    """
    return Site(
        parse_config(ask(["scontrol", "show", "config"])),
        tuple(parse_partitions(ask(["scontrol", "--oneliner", "show", "partition"]))),
        tuple(parse_nodes(ask(["scontrol", "--oneliner", "show", "node"]))),
    )


def _remembered(job_ids: list[str]) -> dict[str, JobState]:
    """What accounting knows of ended jobs; nothing where there is none."""
    if shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-X", "-n", "--parsable2", "-o", SACCT_FIELDS, "-j", ",".join(job_ids)]
    answer = _run(command)
    if answer.returncode:
        if _NO_ACCOUNTING in answer.stderr:
            return {}
        raise _failure(command, answer.stderr)
    return parse_sacct(answer.stdout)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(command), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"SLURM's command {command[0]} is not here; run this where jobs are submitted, or choose cluster=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"SLURM did not answer {command[0]} within {TIMEOUT_S:g} s; try again, or choose cluster=local"
        ) from error


def _failure(command: Sequence[str], said: str) -> SlurmError:
    lines = [line.split("error: ", 1)[-1].strip() for line in said.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(lines)) or "it says nothing"
    if "Unable to contact" in reason:
        return SlurmError(f"SLURM's controller does not answer {command[0]} ({reason}); try again when it is back")
    if _NO_CLUSTER in reason:
        return SlurmError("SLURM's commands are here, but no cluster is set up for this machine; choose cluster=local")
    return SlurmError(f"SLURM refuses {command[0]}: {reason}")
