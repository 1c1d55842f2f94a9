"""``launch/resume.py``: brings back whatever is unfinished and neither queued nor running; safe to call at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.evaluate import ArgumentParser
from pwm_torchrl.cli.preflight import preflight
from pwm_torchrl.cli.prepare import LOCAL, SLURM
from pwm_torchrl.cluster.deaths import read_job
from pwm_torchrl.cluster.slurm import JobState, job_states, slurm_available
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import find_runs
from pwm_torchrl.run.claims import ENDED, open_owner, owner_state
from pwm_torchrl.run.directory import load_config, read_summary
from pwm_torchrl.user_code import make_cwd_importable

__all__ = ["main", "reason_to_leave"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Submits what can go on and says of the rest why it is left alone.

    Returns:
        The exit code: 0, or 1 if a run that should go on could not be submitted.
    """
    parser = ArgumentParser(
        prog=typed("resume"),
        description="Submit again every run that is unfinished and neither queued nor running.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="run directories, or folders that hold them")
    parser.add_argument("--failed", action="store_true", help="also runs that ended with an error of their own")
    args = parser.parse_args(argv)
    runs = sorted((path.resolve() for path in find_runs(args.runs)), key=lambda path: path.name)
    newest = {run: job_id for run in runs for job_id in read_job(run).get("job_ids", [])[-1:]}
    states = job_states(newest.values()) if newest else {}
    code = console.OK
    for run in sorted(runs, key=_waits):
        reason = reason_to_leave(run, states.get(newest.get(run, "")), failed=args.failed)
        if reason is not None:
            console.say(f"{run.name}: left alone, {reason}")
            continue
        try:
            console.say(f"{run.name}: {_bring_back(run)}")
        except ConfigurationError as error:
            console.error(f"{run.name}: {error}")
            code = console.FAILED
    return code


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


def _bring_back(run: Path) -> str:
    """Submit a run as it was submitted before; returns what was done."""
    cfg = load_config(run)
    job = read_job(run)
    on_slurm = bool(job) and slurm_available()
    if cfg.cluster.kind == "slurm" and not on_slurm:
        raise ConfigurationError(f"it was meant for cluster={cfg.cluster.name}, and no SLURM is found here")
    make_cwd_importable()
    preflight([cfg], SLURM if on_slurm else LOCAL, again=True)
    if on_slurm:
        from pwm_torchrl.cluster.submission import resubmit

        return f"job {resubmit(run, cfg, int(job['mem_mb']))}"
    from pwm_torchrl.cli.local import submit_local
    from pwm_torchrl.cluster.snapshot import snapshot, targets_of

    code = snapshot(run.parent, targets_of(asdict(cfg)))
    outcome = submit_local(run, code, progress=cfg.training.progress).follow()
    return str(outcome["status"])
