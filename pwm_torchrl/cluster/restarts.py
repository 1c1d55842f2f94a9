"""Why a job ended, whether it runs again, and the record of this.

There are three sources: the outcome, which an attempt writes itself if it can; the evidence, which the supervisor in
its step writes; and SLURM's record of the job. Depending on the reason and on the progress of earlier attempts, the job
runs again, if necessary with more memory or smaller batches, or the run ends. This module decides that and records it
in the run directory; :mod:`~pwm_torchrl.cluster.end_of_job` carries it out.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.config import Config, micro_batch_key
from pwm_torchrl.errors import LOST_RANKS, ConfigurationError
from pwm_torchrl.files import read_object, read_objects, write_durably
from pwm_torchrl.run.claims import Claim, newest_claim, read_outcome, slurm_job_id
from pwm_torchrl.run.directory import EVENTS_FILE, PLAN_FILE, load_config, read_plan, set_status, write_event
from pwm_torchrl.run.stop import NO_STEP_IN_TIME

# Names of ends and actions in ``events.jsonl``, reports and code ------------------------------------------------------


TIMEOUT = "timeout"  # the time limit was reached or about to be
PREEMPTION = "preemption"  # SLURM needed the resources for another job
REQUEUED = "requeue"  # scontrol requeue, or SLURM ended the job for another reason
NODE_FAILURE = "node_failure"  # SLURM restarted the job, and nothing recorded how it had ended
MEMORY = "memory"  # the kernel killed a process for lack of memory, or the run stopped itself before that
KILLED = "killed"  # a process was killed, but not for lack of memory
START_UP = "start_up"  # the job ended before training began

REQUEUE = "requeue"  # requeue this job with scontrol
RESUBMIT = "resubmit"  # requeue it with another memory request or plan
WAIT = "wait"  # SLURM requeues the job by itself
END = "end"


# Classifying the end of a job and deciding what follows: pure functions -----------------------------------------------


#: Restarts in a row without progress after which a run ends as stalled.
MAX_RESTARTS_WITHOUT_PROGRESS = 2
_SIGKILL = 9


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended.

    Attributes:
        reason (str): a final status of a run, or a name of an end in :mod:`~pwm_torchrl.cluster.restarts`.
        detail (str): description for events and ``launch/status.py``.
        slurm_requeues (bool): whether SLURM requeues the job by itself.
    """

    reason: str
    detail: str = ""
    slurm_requeues: bool = False


@dataclass(frozen=True)
class JobRecord:
    """The relevant fields of SLURM's record of a job, read before the batch script ends.

    Attributes:
        state (str): such as ``RUNNING``, ``COMPLETING``, ``CANCELLED``; empty if SLURM did not answer.
        reason (str): such as ``TimeLimit``.
        requeued (bool): whether SLURM is about to requeue it by itself.
        derived_oom (bool): whether a step's exit code was 0:125, which means an out-of-memory kill.
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
) -> AttemptEnd:
    """Why an attempt ended.

    Args:
        outcome (dict, optional): the outcome that the attempt wrote; ``None`` if it wrote none.
        evidence (sequence of dict): the evidence that each task's supervisor wrote.
        term_received (bool): whether the batch script received SIGTERM.
        record (JobRecord, optional): SLURM's record.
    """
    record = record or JobRecord()
    status = str((outcome or {}).get("status", ""))
    error = str((outcome or {}).get("error", ""))
    if status in ("finished", "storage", "superseded"):
        return AttemptEnd(status, error)
    killed_for_memory = any((each.get("oom_kills") or 0) > 0 for each in evidence) or (
        record.derived_oom and not evidence
    )
    if status == "memory":
        return AttemptEnd(MEMORY, error)
    if killed_for_memory and status != "stopped":
        return AttemptEnd(MEMORY, "the kernel killed a process of the job because its memory limit was reached")
    if record.state.startswith("CANCELLED"):
        return AttemptEnd("stopped", "cancelled")
    signals = {name for each in evidence for name in each.get("signals", {})}
    unsaved = any(each.get("returncode") == NO_STEP_IN_TIME for each in evidence)
    if status == "stopped" or unsaved or term_received:
        saved = "" if status == "stopped" else "; nothing new was saved"
        if any(each.get("preempted") for each in evidence):
            return AttemptEnd(PREEMPTION, f"SLURM preempted the job for another one{saved}", record.requeued)
        if record.reason == "TimeLimit":
            return AttemptEnd(TIMEOUT, f"the time limit was reached{saved}", record.requeued)
        if "SIGUSR2" in signals or (outcome or {}).get("reason") == "SIGUSR2":
            return AttemptEnd(TIMEOUT, f"the time limit was near{saved}", record.requeued)
        if record.requeued or not record.state:
            return AttemptEnd(REQUEUED, f"SLURM asked the job to end{saved}", record.requeued)
        if term_received or "SIGTERM" in signals:
            return AttemptEnd("stopped", f"cancelled{saved}")
        return AttemptEnd("stopped", error)
    if status == "failed" and not _killed(evidence) and LOST_RANKS not in error:
        return AttemptEnd("failed", error)
    if _killed(evidence) or not evidence or LOST_RANKS in error:
        return AttemptEnd(KILLED, "a process of the job was killed")
    return AttemptEnd(START_UP, "the job ended before training began; see its log")


def _killed(evidence: Sequence[Mapping[str, Any]]) -> bool:
    return any(each.get("returncode") == -_SIGKILL for each in evidence)


@dataclass(frozen=True)
class Restart:
    """A restart in the history of a run.

    Attributes:
        reason (str): reason of the end before it.
        progressed (bool): whether the attempt that ended had made progress.
    """

    reason: str
    progressed: bool


@dataclass(frozen=True)
class Decision:
    """What happens after the end of an attempt.

    Attributes:
        action (str): ``requeue`` this job, ``resubmit`` it with another request, ``wait`` for SLURM, which requeues it
            by itself, or ``end``.
        status (str): final status of the run if it ends.
        why (str): description.
    """

    action: str
    status: str = ""
    why: str = ""


def decide_restart(end: AttemptEnd, progressed: bool, before: Sequence[Restart], max_memory_restarts: int) -> Decision:
    """Decides whether and how a run goes on after the end of an attempt.

    Args:
        end (AttemptEnd): how the attempt ended.
        progressed (bool): whether that attempt made progress.
        before (sequence of Restart): earlier restarts, oldest first.
        max_memory_restarts (int): maximum number of restarts with another plan after memory ran out.
    """
    if end.reason not in RESTARTABLE:
        return Decision(END, end.reason, end.detail)
    idle = 0
    for each in (*before, Restart(end.reason, progressed)):
        idle = 0 if each.progressed or each.reason == MEMORY else idle + 1
    if idle >= MAX_RESTARTS_WITHOUT_PROGRESS:
        why = f"{idle} attempts in a row ended without progress, the last one because {end.detail or end.reason}"
        return Decision(END, "stalled", why)
    if end.reason == MEMORY:
        used = sum(each.reason == MEMORY for each in before)
        if used >= max_memory_restarts:
            why = (
                f"memory ran out again after {used} restarts with more memory or a plan that needs less "
                "(cluster.max_memory_restarts)"
            )
            return Decision(END, "memory", why)
        return Decision(RESUBMIT, why=end.detail)
    return Decision(WAIT if end.slurm_requeues else REQUEUE, why=end.detail)


RESTARTABLE = (TIMEOUT, PREEMPTION, REQUEUED, NODE_FAILURE, MEMORY, KILLED)


# Records of a run's jobs: job.json and events -------------------------------------------------------------------------


JOB_FILE = "job.json"


#: Keys with lists of strings, and the pattern of each string: ids are passed to SLURM, which fails for anything else.
_LISTS = {"job_ids": r"\d+(_\d+)?", "awaited_by": r"\d+(_\d+)?", "code": r"(?s).+"}


def read_job(run_dir: Path) -> dict[str, Any]:
    """Content of ``job.json``, the last request, without damaged lists; empty for a run that was never submitted."""
    content = read_object(run_dir / JOB_FILE)
    return {key: value for key, value in content.items() if key not in _LISTS or _is_list(value, _LISTS[key])}


def _is_list(value: Any, form: str) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and re.fullmatch(form, each) for each in value)


def requested_memory_mb(run_dir: Path, job: Mapping[str, Any]) -> int:
    """Host memory that the last job of a run requested, MiB.

    Args:
        run_dir (Path): the run.
        job (Mapping): its record from :func:`read_job`.

    Raises:
        ConfigurationError: if the record has no valid amount.
    """
    asked = job.get("mem_mb")
    if not isinstance(asked, int) or isinstance(asked, bool) or asked <= 0:
        raise ConfigurationError(
            f"{run_dir / JOB_FILE} is damaged: mem_mb={asked} is not an amount of memory; delete it and submit the run "
            "again"
        )
    return asked


def write_job(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of ``job.json``; returns the whole content."""
    content = {**read_job(run_dir), **changes}
    write_durably(run_dir / JOB_FILE, json.dumps(content, indent=2) + "\n")
    return content


def record_submission(run_dir: Path, job_id: str, **request: Any) -> None:
    """Record that a job was submitted for a run."""
    jobs = [*read_job(run_dir).get("job_ids", []), job_id]
    write_job(run_dir, job_ids=jobs, **request)
    asked = {key: value for key, value in request.items() if key != "code"}
    write_event(run_dir, "submit", job_id=job_id, **asked)


def record_restart(run_dir: Path, attempt: int, restart: Restart, action: str, detail: str, job_id: str | None) -> None:
    """Record that an attempt ended and that its run is restarted."""
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
    """Events of one kind, oldest first; an incomplete line, for example from a full disk, is skipped."""
    return [event for event in read_objects(run_dir / EVENTS_FILE) if event.get("event") == kind]


def restarts_of(run_dir: Path) -> list[Restart]:
    """Restarts that happened, oldest first."""
    restarts = events_of(run_dir, "restart")
    return [Restart(str(each.get("reason", "unknown")), bool(each.get("progressed"))) for each in restarts]


# The next memory plan for a job on this machine -----------------------------------------------------------------------


def save_smaller_plan(run_dir: Path, cfg: Config, outcome: Mapping[str, Any]) -> str | None:
    """Save a plan that needs less memory for the next attempt; a job on this machine cannot request more memory.

    Args:
        run_dir (Path): the run's directory.
        cfg (Config): its configuration.
        outcome (dict): outcome of the job.

    Returns:
        str, optional: description of the change; ``None`` if the attempt did not run out of memory, or no plan needs
        less.
    """
    if outcome.get("status") != MEMORY:
        return None
    before = restarts_of(run_dir)
    if sum(each.reason == MEMORY for each in before) >= cfg.cluster.max_memory_restarts:
        return None
    plan = next_plan(run_dir, cfg, 0 if cfg.cluster.host_gib is None else int(cfg.cluster.host_gib * 1024))
    if plan is None:
        return None
    apply_plan(run_dir, plan)
    claim = newest_claim(run_dir)
    attempt = 0 if claim is None else claim.attempt
    record_restart(run_dir, attempt, Restart(MEMORY, progressed=True), REQUEUE, plan.change, None)
    return plan.change


# The next memory plan after memory ran out ----------------------------------------------------------------------------


#: Factor by which the memory request grows each time.
GROWTH = 1.5


@dataclass(frozen=True)
class NextPlan:
    """The plan of the next attempt.

    Attributes:
        mem_mb (int): host memory to request, MiB.
        choices (dict): choices of the memory plan; empty if they do not change.
        change (str): description of the change.
    """

    mem_mb: int
    choices: dict[str, Any]
    change: str


def next_plan(run_dir: Path, cfg: Config, mem_mb: int) -> NextPlan | None:
    """The plan to try after memory ran out; ``None`` if there is no other.

    More memory is requested first, because it costs no speed. At the limit, updates on the host are split into smaller
    micro-batches; after that, the replay is moved to disk. Values that the configuration sets are not changed. A
    damaged plan is reported with a warning and treated as missing.

    Args:
        run_dir (Path): run directory, with the plan of the attempt that ran out of memory.
        cfg (Config): the run's configuration.
        mem_mb (int): host memory that the attempt had, MiB.
    """
    ceiling = mem_mb if cfg.cluster.host_gib is None else int(cfg.cluster.host_gib * 1024)
    if mem_mb < ceiling:
        more = min(ceiling, math.ceil(mem_mb * GROWTH))
        return NextPlan(more, {}, f"--mem {mem_mb} -> {more} MiB")
    plan = read_plan(run_dir, "so no plan that needs less memory can be made from it")
    if plan is None or cfg.memory.kind == "fixed":
        return None
    choices = dict(plan["choices"])
    if plan["prediction"]["compute"] == "host":
        rows = {micro_batch_key(update): rows for update, rows in plan["batches"].items()}
        sizes = {key: _half(choices[key], batch) for key, batch in rows.items() if _open(cfg, key)}
        if any(size != (choices[key] or rows[key]) for key, size in sizes.items()):
            parts = ", ".join(f"{key.removesuffix('_micro_batch')} {size}" for key, size in sizes.items())
            return NextPlan(mem_mb, {**choices, **sizes}, f"smaller micro-batches: {parts}")
    if choices["replay_storage"] == "memory" and cfg.training.replay_storage == "auto":
        return NextPlan(mem_mb, {**choices, "replay_storage": "disk"}, "the replay moves to disk")
    return None


def apply_plan(run_dir: Path, plan: NextPlan) -> None:
    """Save a plan's choices, from which the next attempt starts."""
    if plan.choices:
        saved = read_object(run_dir / PLAN_FILE)
        write_durably(run_dir / PLAN_FILE, json.dumps({**saved, "choices": plan.choices}, indent=2) + "\n")


def _open(cfg: Config, key: str) -> bool:
    return getattr(cfg.memory, key) is None


def _half(size: int | None, batch: int) -> int:
    return max(1, -(-(size or batch) // 2))


# Deciding and recording with the files of a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class JobExecution:
    """One execution of a SLURM job: its id and how often it was requeued before."""

    job_id: str
    restart_count: int

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> JobExecution:
        """The execution that this process belongs to.

        Raises:
            ConfigurationError: outside of a SLURM job.
        """
        environ = os.environ if environ is None else environ
        job_id = slurm_job_id(environ)
        if job_id is None:
            raise ConfigurationError("This is not a SLURM job: SLURM_JOB_ID is not set.")
        return cls(job_id, int(environ.get("SLURM_RESTART_COUNT", "0") or 0))

    def outcome_file(self, run: Path) -> Path:
        """The file in which the job's function writes the outcome, in case the attempt could not record its own."""
        return run / "attempts" / f"outcome-{self.job_id}-{self.restart_count}.json"

    @property
    def _evidence(self) -> str:
        """Prefix of its evidence files; the batch script uses the same names."""
        return f"evidence-{self.job_id}-{self.restart_count}"

    def evidence(self, run: Path) -> list[dict[str, Any]]:
        """The evidence that the supervisors of its tasks wrote."""
        files = sorted((run / "attempts").glob(f"{self._evidence}-*.json"))
        return [content for file in files if (content := read_object(file))]  # damaged files are ignored

    def claim(self, run: Path) -> Claim | None:
        """Its claim of the run; ``None`` if it ended before it claimed the run."""
        newest = newest_claim(run)
        if newest is None:
            return None
        mine = (newest.owner.job_id, newest.owner.restart_count) == (self.job_id, self.restart_count)
        return newest if mine else None

    def outcome(self, run: Path) -> dict[str, Any] | None:
        """The outcome that its attempt recorded or else the job's function; ``None`` if neither did."""
        claim = self.claim(run)
        said = None if claim is None else read_outcome(run, claim.attempt)
        if said:
            return said
        return read_object(self.outcome_file(run)) or None


def progressed(run: Path, claim: Claim | None) -> bool:
    """Whether an attempt saved a checkpoint with updates of its own."""
    if claim is None:
        return False
    folder = run / "checkpoints" / f"attempt-{claim.attempt:04d}"
    own = [path.name for path in folder.glob("checkpoint-*")] if folder.is_dir() else []
    if not own:
        return False
    said = read_outcome(run, claim.attempt)
    return said is None or bool(said.get("updates", 1))


def decide(
    run: Path, execution: JobExecution, *, term_received: bool, record: JobRecord
) -> tuple[AttemptEnd, Decision]:
    """Why this execution of the job ended, and the decision; changes nothing."""
    end = classify(execution.outcome(run), execution.evidence(run), term_received=term_received, record=record)
    most = load_config(run).cluster.max_memory_restarts
    return end, decide_restart(end, progressed(run, execution.claim(run)), restarts_of(run), most)


def record_decision(run: Path, execution: JobExecution, end: AttemptEnd, decision: Decision, detail: str) -> None:
    """Record a restart in the run's events, or an end in its events and summary."""
    claim = execution.claim(run)
    if decision.action != END:
        restart = Restart(end.reason, progressed(run, claim))
        record_restart(run, 0 if claim is None else claim.attempt, restart, decision.action, detail, execution.job_id)
        return
    said = execution.outcome(run)
    if said is None or said.get("status") != decision.status:
        write_event(run, decision.status, error=decision.why)
        set_status(run, decision.status, whatever_it_was=True)


def record_slurm_restart(run: Path) -> None:
    """Record, at the start of a requeued job, a restart that SLURM made by itself, for example after a node failure.

    Raises:
        ConfigurationError: if the run is not to be continued, for example after repeated restarts without progress.
    """
    here = JobExecution.here()
    if here.restart_count == 0:
        return
    before = JobExecution(here.job_id, here.restart_count - 1)
    claim = before.claim(run)
    if claim is None or _is_noted(run, claim):
        return
    outcome = before.outcome(run)
    end = classify(outcome, before.evidence(run), term_received=outcome is not None, record=JobRecord(requeued=True))
    if outcome is None and not before.evidence(run):
        end = AttemptEnd(NODE_FAILURE, "the node failed, or the whole job was killed with it", slurm_requeues=True)
    decision = decide_restart(
        end, progressed(run, claim), restarts_of(run), load_config(run).cluster.max_memory_restarts
    )
    record_decision(run, before, end, decision, end.detail)
    if decision.action == END:
        raise ConfigurationError(f"{run} is not continued: {decision.why}")


def _is_noted(run: Path, claim: Claim) -> bool:
    return any(each.get("attempt") == claim.attempt for each in events_of(run, "restart"))
