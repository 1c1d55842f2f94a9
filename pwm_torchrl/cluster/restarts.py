"""From a death to what is done about it, with the files of a run: by the batch script, or by the next attempt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.deaths import Answer, Death, JobRecord, Restart, answer, classify
from pwm_torchrl.cluster.reasons import END, NODE_FAILURE
from pwm_torchrl.cluster.record import events_of, note_restart, restarts_of
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.claims import Claim, newest_claim, read_outcome
from pwm_torchrl.training.config_file import load_config
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.owners import slurm_job_id
from pwm_torchrl.training.summary_file import set_status


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

    def error_file(self, run: Path) -> Path:
        """Where the job's function tells of an error, in case its attempt could not."""
        return run / "attempts" / f"{self._evidence}.error"

    @property
    def _evidence(self) -> str:
        """How the names of its files begin; the batch script names them too."""
        return f"evidence-{self.job_id}-{self.restart_count}"

    def evidence(self, run: Path) -> list[dict[str, Any]]:
        """What the supervisors of its tasks wrote."""
        found = []
        for file in sorted((run / "attempts").glob(f"{self._evidence}-*.json")):
            try:
                found.append(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                continue  # torn by a full disk: as if it were not there
        return found

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
        try:
            content: dict[str, Any] = json.loads(self.error_file(run).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content


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
