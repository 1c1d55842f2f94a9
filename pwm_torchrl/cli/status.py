"""``launch/status.py``: prints one line per run, with the state of its SLURM job."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from pwm_torchrl.cli import console
from pwm_torchrl.cluster.restarts import events_of, read_job
from pwm_torchrl.cluster.slurm import JobState, SlurmError, job_states
from pwm_torchrl.memory.readings import format_bytes
from pwm_torchrl.report.collect import FAILED, RunReport, find_runs, read_runs, settle
from pwm_torchrl.report.tables import Table
from pwm_torchrl.run.claims import UNKNOWN, describe

__all__ = ["line_of", "run"]

#: Number of last metrics rows from which the speed is computed.
_RECENT = 50
_LONG_AGO = datetime.min.replace(tzinfo=timezone.utc)
_COLUMNS = ("run", "status", "job", "restarts", "progress", "left", "host memory", "last event")


def run(args: Namespace) -> int:
    """Prints the table; calls squeue once for all runs."""
    runs = read_runs(find_runs(args.runs))
    newest = {run.path: job_id for run in runs for job_id in read_job(run.path).get("job_ids", [])[-1:]}
    owners = [run.owner.job_id for run in runs if run.owner is not None and run.owner.job_id is not None]
    states: dict[str, JobState] | None = {}
    if newest or owners:
        try:
            states = job_states(dict.fromkeys([*newest.values(), *owners]))
        except SlurmError as error:
            console.say(f"{error}; the table shows the run directories only", err=True)
            states = None
    settle(runs, states)
    rows = []
    for run in runs:
        job = (states or {}).get(newest.get(run.path, ""))
        if states is not None and run.path in newest and job is None and not _has_begun(run):
            job = JobState(newest[run.path], "CANCELLED")  # SLURM has forgotten a job that never started
        rows.append(list(line_of(run, job)))
    narrow = ("last event", "host memory", "run", "restarts", "left")
    below = dict.fromkeys(("last event", "run"), "")
    console.say(Table(list(_COLUMNS), rows, narrow=narrow, below=below).text(console.terminal_width()))
    for run in runs:
        for problem in run.problems:
            console.say(f"{run.name}: {problem}", err=True)
    return console.OK


def line_of(run: RunReport, job: JobState | None) -> tuple[str, ...]:
    """The cells of a run's line.

    Args:
        run (RunReport): the run.
        job (JobState, optional): SLURM's state of its newest job; ``None`` if there is none or SLURM has forgotten it.
    """
    total = run.restarts.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in run.restarts.items())
    planned = run.epochs_planned
    status = _status(run.status, job)
    where = "-" if job is None else f"{job.job_id} {job.state.lower()}" + (f" on {job.nodes}" if job.nodes else "")
    return (
        run.name,
        status,
        where,
        f"{total}: {reasons}" if total else "0",
        f"{run.epochs_done}/{planned} {100 * run.epochs_done / planned:.0f} %" if planned else "-",
        _left(run) if status == "running" else "-",
        " of ".join(format_bytes(int(each)) for each in (run.host_bytes, run.host_planned) if each) or "-",
        _last(run, status, job),
    )


def _has_begun(run: RunReport) -> bool:
    """Whether a job of the run has written anything to its directory."""
    return run.status != "not started" or any((run.path / "attempts").glob("*"))


def _status(said: str, job: JobState | None) -> str:
    if job is not None and job.state == "CANCELLED" and said in ("not started", "waiting"):
        return "cancelled"
    if said == "finished" or job is None or job.ended:
        return said
    if job.held or job.impossible:
        return "held"
    return "queued" if job.waiting else "running"


def _left(run: RunReport) -> str:
    """Estimated remaining time at the speed of the last epochs."""
    times = [each for each in run.metrics.get("time/epoch_s", [])[-_RECENT:] if math.isfinite(each)]
    if not times or run.epochs_planned is None:
        return "-"
    seconds = (run.epochs_planned - run.epochs_done) * sum(times) / len(times)
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d}" if hours else f"{minutes} min"


def _last(run: RunReport, status: str, job: JobState | None) -> str:
    """The last restart or error, and how long ago it was; for a job that waits for the user, what to do."""
    if job is not None and job.held:
        return f"{job.reason}; release it with: scontrol release {job.job_id}"
    if job is not None and job.impossible:
        return f"{job.reason}: it cannot start as requested; scancel {job.job_id}, change the request, submit again"
    if status == "died":
        return run.last_error or ""
    if status == "running" and job is None and run.owner is not None and run.owner_state == UNKNOWN:
        return f"{describe(run.owner)}: cannot tell from this machine whether it is still running"
    found = [event for kind in ("restart", *FAILED) for event in events_of(run.path, kind)]
    if not found or status == "finished":
        return ""
    newest = max(found, key=_time_of)
    text = " ".join(str(newest.get("detail") or newest.get("error") or newest["event"]).split())[:120]
    ago = (datetime.now(timezone.utc) - _time_of(newest)).total_seconds() / 60
    return text if _time_of(newest) == _LONG_AGO else f"{text} ({ago:.0f} min ago)"


def _time_of(event: Mapping[str, Any]) -> datetime:
    """Time of an event; :data:`_LONG_AGO` if it has none."""
    try:
        when = datetime.fromisoformat(event["time"])
    except (KeyError, TypeError, ValueError):
        return _LONG_AGO
    return when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
