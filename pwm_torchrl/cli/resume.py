"""``launch/resume.py``: finds whatever is unfinished and neither queued nor running; safe to call at any time."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cluster.deaths import read_job
from pwm_torchrl.cluster.job import require_submitit
from pwm_torchrl.cluster.slurm import JobState, job_states
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import find_runs
from pwm_torchrl.run.claims import ENDED, open_owner, owner_state
from pwm_torchrl.run.directory import load_config, read_summary

__all__ = ["reason_to_leave", "to_bring_back"]


def to_bring_back(args: Namespace) -> list[Path] | int:
    """Runs to be submitted again, or the exit code if there are none; says of the others why they are left alone."""
    runs = sorted((path.resolve() for path in find_runs(args.runs)), key=lambda path: path.name)
    newest = {run: job_id for run in runs for job_id in read_job(run).get("job_ids", [])[-1:]}
    states = job_states(newest.values()) if newest else {}
    found = []
    for run in sorted(runs, key=_waits):
        reason = reason_to_leave(run, states.get(newest.get(run, "")), failed=args.failed)
        if reason is None:
            found.append(run)
        else:
            console.say(f"{run.name}: left alone, {reason}")
    if not found:
        return console.OK
    require_submitit()
    return found


def reason_to_leave(run: Path, job: JobState | None, *, failed: bool) -> str | None:
    """Why a run is not submitted again; ``None`` if it should be.

    Args:
        run (Path): its directory.
        job (JobState, optional): SLURM's word on its newest job.
        failed (bool): whether runs that ended with an error go on too.
    """
    status = read_summary(run).get("status", "not started")
    if status == "finished":
        return "finished"
    if job is not None and not job.ended:
        if job.held:
            return f"job {job.job_id} is held; let it go on with: scontrol release {job.job_id}"
        return f"job {job.job_id} is {job.state.lower()}"
    owner = open_owner(run)
    if owner is not None and owner_state(owner) != ENDED:
        return f"process {owner.pid} on {owner.host} trains it, or may do so"
    if status == "failed" and not failed:
        return "failed; --failed tries it again"
    return None


def _waits(run: Path) -> bool:
    """Whether a run may have to wait for another, a pre-training, which is then submitted before it."""
    try:
        return load_config(run).world_model is not None
    except ConfigurationError:
        return True  # told when it is its turn
