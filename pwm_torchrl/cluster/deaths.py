"""Why jobs end, and the record of each attempt that says so.

An attempt says itself how it ended (its outcome), if it can; the supervisor in its step knows what killed it (its
evidence); SLURM's record tells the rest. What is done depends on the reason and on what the attempts before achieved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import read_object, read_objects, write_durably
from pwm_torchrl.run.directory import EVENTS_FILE, write_event
from pwm_torchrl.run.stop import NO_STEP_IN_TIME

# The words by which deaths and their answers are named in ``events.jsonl``, reports and code --------------------------


TIMEOUT = "timeout"  # the time limit came near or was reached
PREEMPTION = "preemption"  # another job was more important
REQUEUED = "requeue"  # scontrol requeue, or another end that SLURM asked for
NODE_FAILURE = "node_failure"  # SLURM restarted the job and nobody had said that it ended
MEMORY = "memory"  # the kernel killed a process, or the run's own guard stopped it
KILLED = "killed"  # a process was killed and memory was not the reason
START_UP = "start_up"  # it ended before training began

REQUEUE = "requeue"  # scontrol requeue, from within
RESUBMIT = "resubmit"  # the same, with another request
WAIT = "wait"  # SLURM brings the job back by itself
END = "end"


# Every way in which a job ends, told apart, and what is done about it: pure functions ---------------------------------


#: Restarts in a row without progress after which a run is left alone.
MOST_WITHOUT_PROGRESS = 2
_SIGKILL = 9
#: In the message of a rank whose fellows are gone: the reason is theirs.
_LOST_RANK = "cannot reach the other"


@dataclass(frozen=True)
class Death:
    """How an attempt ended.

    Attributes:
        reason (str): a status of a run that is over, or one of :mod:`~pwm_torchrl.cluster.deaths`.
        detail (str): in words, for events and ``launch/status.py``.
        slurm_requeues (bool): whether SLURM brings the job back by itself.
    """

    reason: str
    detail: str = ""
    slurm_requeues: bool = False


@dataclass(frozen=True)
class JobRecord:
    """What of SLURM's record of a job matters here, read before the batch script ends.

    Attributes:
        state (str): such as ``RUNNING``, ``COMPLETING``, ``CANCELLED``; empty if SLURM did not answer.
        reason (str): such as ``TimeLimit``.
        requeued (bool): whether SLURM is about to bring it back by itself.
        derived_oom (bool): whether a step's exit code was 0:125, which stands for an out-of-memory kill.
    """

    state: str = ""
    reason: str = ""
    requeued: bool = False
    derived_oom: bool = False


def classify(
    outcome: Mapping[str, Any] | None,
    evidence: Sequence[Mapping[str, Any]],
    *,
    term_received: bool = False,
    record: JobRecord | None = None,
) -> Death:
    """Why an attempt ended.

    Args:
        outcome (dict, optional): what the attempt itself wrote; ``None`` if it could not.
        evidence (sequence of dict): what each task's supervisor wrote.
        term_received (bool): whether the batch script was sent SIGTERM.
        record (JobRecord, optional): SLURM's.
    """
    record = record or JobRecord()
    status = str((outcome or {}).get("status", ""))
    error = str((outcome or {}).get("error", ""))
    if status in ("finished", "storage", "superseded"):
        return Death(status, error)
    killed_for_memory = any((each.get("oom_kills") or 0) > 0 for each in evidence) or (
        record.derived_oom and not evidence
    )
    if status == "memory":
        return Death(MEMORY, error)
    if killed_for_memory and status != "stopped":
        return Death(MEMORY, "the kernel killed a process of the job because its memory limit was reached")
    if record.state.startswith("CANCELLED"):
        return Death("stopped", "cancelled")
    signals = {name for each in evidence for name in each.get("signals", {})}
    unsaved = any(each.get("returncode") == NO_STEP_IN_TIME for each in evidence)
    if status == "stopped" or unsaved or term_received:
        saved = "" if status == "stopped" else "; nothing new was saved"
        if any(each.get("preempted") for each in evidence):
            return Death(PREEMPTION, f"another job needed its place{saved}", record.requeued)
        if record.reason == "TimeLimit":
            return Death(TIMEOUT, f"the time limit was reached{saved}", record.requeued)
        if "SIGUSR2" in signals or (outcome or {}).get("reason") == "SIGUSR2":
            return Death(TIMEOUT, f"the time limit came near{saved}", record.requeued)
        if record.requeued or not record.state:
            return Death(REQUEUED, f"SLURM asked the job to end{saved}", record.requeued)
        if term_received or "SIGTERM" in signals:
            return Death("stopped", f"cancelled{saved}")
        return Death("stopped", error)
    if status == "failed" and not _killed(evidence) and _LOST_RANK not in error:
        return Death("failed", error)
    if _killed(evidence) or not evidence or _LOST_RANK in error:
        return Death(KILLED, "a process of the job was killed")
    return Death(START_UP, "the job ended before training began; its log tells why")


def _killed(evidence: Sequence[Mapping[str, Any]]) -> bool:
    return any(each.get("returncode") == -_SIGKILL for each in evidence)


@dataclass(frozen=True)
class Restart:
    """One that happened.

    Attributes:
        reason (str): of the death before it.
        progressed (bool): whether the attempt that died had got further than the one before.
    """

    reason: str
    progressed: bool


@dataclass(frozen=True)
class Answer:
    """What is done about a death.

    Attributes:
        action (str): ``requeue`` this job, ``resubmit`` with another request, ``wait`` for SLURM, which brings it back
            by itself, or ``end``.
        status (str): of the run, when it ends.
        why (str): in words.
    """

    action: str
    status: str = ""
    why: str = ""


def answer(death: Death, progressed: bool, before: Sequence[Restart], max_memory_restarts: int) -> Answer:
    """What is done about a death.

    Args:
        death (Death): of the attempt.
        progressed (bool): whether that attempt got further than what it began from.
        before (sequence of Restart): earlier ones, oldest first.
        max_memory_restarts (int): how often memory that ran out is answered with another plan.
    """
    if death.reason not in COMES_BACK:
        return Answer(END, death.reason, death.detail)
    idle = 0
    for each in (*before, Restart(death.reason, progressed)):
        idle = 0 if each.progressed or each.reason == MEMORY else idle + 1
    if idle >= MOST_WITHOUT_PROGRESS:
        why = f"{idle} attempts in a row ended without progress, the last one because {death.detail or death.reason}"
        return Answer(END, "stalled", why)
    if death.reason == MEMORY:
        used = sum(each.reason == MEMORY for each in before)
        if used >= max_memory_restarts:
            why = f"memory ran out again after {used} larger or thriftier plans (cluster.max_memory_restarts)"
            return Answer(END, "memory", why)
        return Answer(RESUBMIT, why=death.detail)
    return Answer(WAIT if death.slurm_requeues else REQUEUE, why=death.detail)


COMES_BACK = (TIMEOUT, PREEMPTION, REQUEUED, NODE_FAILURE, MEMORY, KILLED)


# What the launcher keeps of a run beside its training -----------------------------------------------------------------


JOB_FILE = "job.json"


#: Lists of texts, with the form of each text: SLURM is asked about ids, and refuses to answer about anything else.
_LISTS = {"job_ids": r"\d+(_\d+)?", "awaited_by": r"\d+(_\d+)?", "code": r"(?s).+"}


def read_job(run_dir: Path) -> dict[str, Any]:
    """What was asked for, without what is damaged; empty for a run that was never submitted."""
    content = read_object(run_dir / JOB_FILE)
    return {key: value for key, value in content.items() if key not in _LISTS or _is_list(value, _LISTS[key])}


def _is_list(value: Any, form: str) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and re.fullmatch(form, each) for each in value)


def memory_asked(run_dir: Path) -> int:
    """Host memory that the last job of a run asked for, MiB.

    Raises:
        ConfigurationError: if its file does not say so.
    """
    asked = read_job(run_dir).get("mem_mb")
    if not isinstance(asked, int) or isinstance(asked, bool) or asked <= 0:
        raise ConfigurationError(
            f"{run_dir / JOB_FILE} is damaged: mem_mb={asked} is no amount of memory; delete it and submit the run "
            "again"
        )
    return asked


def write_job(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Change what was asked for; returns all of it."""
    content = {**read_job(run_dir), **changes}
    write_durably(run_dir / JOB_FILE, json.dumps(content, indent=2) + "\n")
    return content


def note_submission(run_dir: Path, job_id: str, **request: Any) -> None:
    """A job for this run is queued."""
    jobs = [*read_job(run_dir).get("job_ids", []), job_id]
    write_job(run_dir, job_ids=jobs, **request)
    asked = {key: value for key, value in request.items() if key != "code"}
    write_event(run_dir, "submit", job_id=job_id, **asked)


def note_restart(run_dir: Path, attempt: int, restart: Restart, action: str, detail: str, job_id: str | None) -> None:
    """An attempt died and its run comes back."""
    write_event(
        run_dir,
        "restart",
        reason=restart.reason,
        progressed=restart.progressed,
        attempt=attempt,
        answer=action,
        detail=detail,
        job_id=job_id,
    )


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, oldest first; a line that was torn by a full disk is passed over."""
    return [event for event in read_objects(run_dir / EVENTS_FILE) if event.get("event") == kind]


def restarts_of(run_dir: Path) -> list[Restart]:
    """Restarts that happened, oldest first."""
    restarts = events_of(run_dir, "restart")
    return [Restart(str(each.get("reason", "unknown")), bool(each.get("progressed"))) for each in restarts]
