"""What is decided when a job has ended: run it again, with more memory or smaller batches, or leave it.

Decides and keeps the record of it in the run's directory; :mod:`~pwm_torchrl.cluster.end_of_job` carries it out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.deaths import (
    END,
    MEMORY,
    NODE_FAILURE,
    REQUEUE,
    Answer,
    Death,
    JobRecord,
    Restart,
    answer,
    classify,
    events_of,
    note_restart,
    restarts_of,
)
from pwm_torchrl.config import Config, micro_batch_key
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import read_object, write_durably
from pwm_torchrl.run.claims import Claim, newest_claim, read_outcome, slurm_job_id
from pwm_torchrl.run.directory import PLAN_FILE, load_config, read_plan, set_status, write_event

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
