"""``launch/submit.py``: runs as jobs of their own, on SLURM where it is found, else on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.snapshot import snapshot, targets_of
from pwm_torchrl.commands import typed
from pwm_torchrl.launch import console
from pwm_torchrl.launch.dry_run import dry_run
from pwm_torchrl.launch.follow import stop_signals_as_interrupt
from pwm_torchrl.launch.help import help_text, wants_help
from pwm_torchrl.launch.job import LOG_FILE
from pwm_torchrl.launch.local import refuse_while_running, submit_local
from pwm_torchrl.launch.prepare import DEBUG, HERE, SLURM, Prepared, compose_all, place_of, plan_for_slurm
from pwm_torchrl.launch.run_dir import RunDir, prepare_run_dir, read_summary
from pwm_torchrl.launch.train import run_in_process
from pwm_torchrl.training.config import Config

__all__ = ["main"]

DRY_RUN = "--dry-run"


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes configurations, submits the runs, and on this machine follows them to their end.

    Returns:
        The exit code: 0 finished or queued, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130
        stopped; of several runs the highest.
    """
    words = list(argv or ())
    if wants_help(words):
        console.say(help_text("submit"))
        return console.OK
    dry = DRY_RUN in words
    runs = compose_all([word for word in words if word != DRY_RUN])
    place = place_of(runs[0].config)
    if dry:
        dry_run(runs, place)
        return console.OK
    if place == SLURM:
        return _to_slurm(runs)
    codes = [_one(run, place) for run in runs]
    return max(codes)


def _one(run: Prepared, place: str) -> int:
    """A run here, to its end."""
    config = run.config
    if config.run_dir is not None:
        refuse_while_running(Path(config.run_dir).expanduser().absolute())
    prepared = prepare_run_dir(config)
    if place in (DEBUG, HERE):
        return run_in_process(config, prepared, run.words, script="submit")
    console.say(f"{'resuming' if prepared.resume else 'run'}: {prepared.path}")
    return _follow(config, prepared, run.words)


def _follow(config: Config, run: RunDir, words: Sequence[str]) -> int:
    """A job on this machine, again with a thriftier plan each time its memory ran out."""
    from pwm_torchrl.cluster.local_restarts import thriftier_plan

    code = snapshot(run.path.parent, targets_of(asdict(config)))
    with stop_signals_as_interrupt():
        while True:
            outcome = submit_local(run.path, code).follow()
            change = thriftier_plan(run.path, config, outcome)
            if change is None:
                return _conclude(outcome, run.path, words)
            console.say(f"memory ran out, so the run goes on with {change}")


def _to_slurm(runs: Sequence[Prepared]) -> int:
    """Queue all runs; nothing is written before everything is checked and planned."""
    from pwm_torchrl.cluster.submission import submit_runs

    _, resources = plan_for_slurm(runs)
    for run in runs:
        if run.config.run_dir is not None:
            refuse_while_queued(Path(run.config.run_dir).expanduser().absolute())
    configs = [run.config for run in runs]
    folders = [prepare_run_dir(config).path for config in configs]
    parent = folders[0].parent
    code = snapshot(parent, (name for config in configs for name in targets_of(asdict(config))))
    submitted = submit_runs(folders, configs, resources, code, parent)
    for each in submitted:
        console.say(f"job {each.job_id}: {each.run_dir}")
    what = "it" if len(submitted) == 1 else "them"
    where = folders[0] if len(folders) == 1 else parent
    console.say(f"queued on cluster={configs[0].cluster.name}; watch {what} with: {typed('status')} {where}")
    return console.OK


def refuse_while_queued(run_dir: Path) -> None:
    """Two jobs for one directory: the second would wait for the first and then find it finished.

    Raises:
        ConfigurationError: if a job of the run is queued or runs.
    """
    from pwm_torchrl.cluster.query import live_job

    job = live_job(run_dir)
    if job is not None:
        raise console.ConfigurationError(
            f"run_dir={run_dir} has SLURM job {job.job_id}, which is {job.state.lower()}; wait for it, or cancel it "
            f"with: scancel {job.job_id}"
        )


def _conclude(outcome: dict[str, Any], run_dir: Path, words: Sequence[str]) -> int:
    """Last lines and exit code."""
    status = outcome["status"]
    summary = read_summary(run_dir) or outcome.get("summary") or {}
    if status == "finished":
        console.say(console.summary_line(summary, run_dir))
        return console.OK
    if status == "stopped":
        console.say(console.summary_line({**summary, "status": "stopped"}, run_dir))
        console.say(console.resume_hint("submit", words, run_dir), err=True)
        return console.STOPPED
    message = f"{outcome.get('error', f'the run ended with status {status}')}\nfull log: {run_dir / LOG_FILE}"
    code = console.fail(message, status, "submit", words, run_dir)
    return console.BAD_INPUT if outcome.get("bad_input") else code
