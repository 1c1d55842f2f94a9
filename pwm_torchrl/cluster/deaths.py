"""Why jobs end, what is done about it, and the record of each attempt that says so.

An attempt says itself how it ended (its outcome), if it can; the supervisor in its step knows what killed it (its
evidence); SLURM's record tells the rest. What is done depends on the reason and on what the attempts before achieved:
the job runs again, with more memory or smaller batches, or it is left. That is decided and recorded in the run's
directory here; :mod:`~pwm_torchrl.cluster.end_of_job` carries it out.
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
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import read_object, read_objects, write_durably
from pwm_torchrl.run.claims import Claim, newest_claim, read_outcome, slurm_job_id
from pwm_torchrl.run.directory import EVENTS_FILE, PLAN_FILE, load_config, read_plan, set_status, write_event
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


def memory_asked(run_dir: Path, job: Mapping[str, Any]) -> int:
    """Host memory that the last job of a run asked for, MiB.

    Args:
        run_dir (Path): the run.
        job (Mapping): what :func:`read_job` read of it.

    Raises:
        ConfigurationError: if its file does not say so.
    """
    asked = job.get("mem_mb")
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


# A job on this machine whose memory ran out: the next plan, as a SLURM job would get it -------------------------------


def thriftier_plan(run_dir: Path, cfg: Config, outcome: Mapping[str, Any]) -> str | None:
    """Let the next attempt start from a plan that needs less; there is no more memory to ask for here.

    Args:
        run_dir (Path): the run's directory.
        cfg (Config): its configuration.
        outcome (dict): of the attempt's job.

    Returns:
        str, optional: what changes, in words; ``None`` if the attempt did not end for memory or nothing is left.
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
    note_restart(run_dir, attempt, Restart(MEMORY, progressed=True), REQUEUE, plan.change, None)
    return plan.change


# The next memory plan after one that was too small --------------------------------------------------------------------


#: Factor of each larger request.
GROWTH = 1.5
MIB = 2**20


@dataclass(frozen=True)
class NextPlan:
    """What changes.

    Attributes:
        mem_mb (int): host memory to ask for, MiB.
        choices (dict): of the plan that the next attempt starts from; empty if they stay.
        change (str): in words.
    """

    mem_mb: int
    choices: dict[str, Any]
    change: str


def next_plan(run_dir: Path, cfg: Config, mem_mb: int) -> NextPlan | None:
    """What to try after memory ran out; ``None`` if nothing is left.

    More memory comes first, since it costs no speed. At the ceiling, updates on the host are split further, and then
    the replay goes to disk. What the configuration sets itself stays. A plan that is damaged is told, and is none.

    Args:
        run_dir (Path): with the plan of the attempt that died.
        cfg (Config): the run's configuration.
        mem_mb (int): host memory that it had, MiB.
    """
    ceiling = mem_mb if cfg.cluster.host_gib is None else int(cfg.cluster.host_gib * 1024)
    if mem_mb < ceiling:
        more = min(ceiling, math.ceil(mem_mb * GROWTH))
        return NextPlan(more, {}, f"--mem {mem_mb} -> {more} MiB")
    plan = read_plan(run_dir, "no thriftier one can be made from it")
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
        return NextPlan(mem_mb, {**choices, "replay_storage": "disk"}, "the replay goes to disk")
    return None


def apply_plan(run_dir: Path, plan: NextPlan) -> None:
    """Let the next attempt start from a plan's choices."""
    if plan.choices:
        saved = read_object(run_dir / PLAN_FILE)
        write_durably(run_dir / PLAN_FILE, json.dumps({**saved, "choices": plan.choices}, indent=2) + "\n")


def _open(cfg: Config, key: str) -> bool:
    return getattr(cfg.memory, key) is None


def _half(size: int | None, batch: int) -> int:
    return max(1, -(-(size or batch) // 2))


# From a death to what is done about it, with the files of a run -------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """One life of a SLURM job: its id and how often it was requeued before."""

    job_id: str
    restart_count: int

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Life:
        """The one that this process belongs to.

        Raises:
            ConfigurationError: outside of a SLURM job.
        """
        environ = os.environ if environ is None else environ
        job_id = slurm_job_id(environ)
        if job_id is None:
            raise ConfigurationError("This is not a SLURM job: SLURM_JOB_ID is not set.")
        return cls(job_id, int(environ.get("SLURM_RESTART_COUNT", "0") or 0))

    def outcome_file(self, run: Path) -> Path:
        """Where the job's function tells how it ended, in case its attempt could not."""
        return run / "attempts" / f"outcome-{self.job_id}-{self.restart_count}.json"

    @property
    def _evidence(self) -> str:
        """How the names of its files begin; the batch script names them too."""
        return f"evidence-{self.job_id}-{self.restart_count}"

    def evidence(self, run: Path) -> list[dict[str, Any]]:
        """What the supervisors of its tasks wrote."""
        files = sorted((run / "attempts").glob(f"{self._evidence}-*.json"))
        return [content for file in files if (content := read_object(file))]  # torn by a full disk: as if not there

    def claim(self, run: Path) -> Claim | None:
        """Its attempt at the run; ``None`` if it died before it claimed the run."""
        newest = newest_claim(run)
        if newest is None:
            return None
        mine = (newest.owner.job_id, newest.owner.restart_count) == (self.job_id, self.restart_count)
        return newest if mine else None

    def outcome(self, run: Path) -> dict[str, Any] | None:
        """How its attempt, or the job's function if it came no further, said that it ended."""
        claim = self.claim(run)
        said = None if claim is None else read_outcome(run, claim.attempt)
        if said:
            return said
        return read_object(self.outcome_file(run)) or None


def progressed(run: Path, claim: Claim | None) -> bool:
    """Whether an attempt saved something that it did not begin from."""
    if claim is None:
        return False
    folder = run / "checkpoints" / f"attempt-{claim.attempt:04d}"
    own = [path.name for path in folder.glob("checkpoint-*")] if folder.is_dir() else []
    if not own:
        return False
    said = read_outcome(run, claim.attempt)
    return said is None or bool(said.get("updates", 1))


def decide(run: Path, life: Life, *, term_received: bool, record: JobRecord) -> tuple[Death, Answer]:
    """Why this life of the job ended, and what is done; nothing is changed."""
    death = classify(life.outcome(run), life.evidence(run), term_received=term_received, record=record)
    most = load_config(run).cluster.max_memory_restarts
    return death, answer(death, progressed(run, life.claim(run)), restarts_of(run), most)


def note(run: Path, life: Life, death: Death, reply: Answer, detail: str) -> None:
    """Write a restart or an end into the run's events and summary."""
    claim = life.claim(run)
    if reply.action != END:
        restart = Restart(death.reason, progressed(run, claim))
        note_restart(run, 0 if claim is None else claim.attempt, restart, reply.action, detail, life.job_id)
        return
    said = life.outcome(run)
    if said is None or said.get("status") != reply.status:
        write_event(run, reply.status, error=reply.why)
        set_status(run, reply.status, whatever_it_was=True)


def before_training(run: Path) -> None:
    """At the start of a job's new life: tell a restart that nobody decided, such as after a node failure.

    Raises:
        ConfigurationError: if the run keeps dying without progress.
    """
    here = Life.here()
    if here.restart_count == 0:
        return
    before = Life(here.job_id, here.restart_count - 1)
    claim = before.claim(run)
    if claim is None or _is_noted(run, claim):
        return
    outcome = before.outcome(run)
    death = classify(outcome, before.evidence(run), term_received=outcome is not None, record=JobRecord(requeued=True))
    if outcome is None and not before.evidence(run):
        death = Death(NODE_FAILURE, "the node failed, or the whole job was killed with it", slurm_requeues=True)
    reply = answer(death, progressed(run, claim), restarts_of(run), load_config(run).cluster.max_memory_restarts)
    note(run, before, death, reply, death.detail)
    if reply.action == END:
        raise ConfigurationError(f"{run} is not continued: {reply.why}")


def _is_noted(run: Path, claim: Claim) -> bool:
    return any(each.get("attempt") == claim.attempt for each in events_of(run, "restart"))
