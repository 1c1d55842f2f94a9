"""``launch/resume.py``: finds the runs that are unfinished and neither queued nor running; safe to call at any time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import check_settings_used
from pwm_torchrl.cli.compose import compose_onto, typed_keys
from pwm_torchrl.cli.derived_settings import known_action_repeat, set_epochs
from pwm_torchrl.cli.validate import validate
from pwm_torchrl.cluster.job import require_submitit
from pwm_torchrl.cluster.restarts import read_job
from pwm_torchrl.cluster.slurm import JobState, job_states
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import find_runs
from pwm_torchrl.run.claims import ENDED, open_owner, owner_state
from pwm_torchrl.run.directory import keys_preventing_resume, load_config, read_summary

__all__ = ["RunsToResume", "changed_config", "find_runs_to_resume", "reason_not_to_resume"]


class RunsToResume(NamedTuple):
    """Runs to submit again with their configurations, the keys that were changed, and the exit code so far."""

    runs: list[tuple[Path, Config]]
    typed: Mapping[str, Any]
    code: int


#: Keys that have no effect when a run is resumed, and what to do instead.
_FIXED = {
    "run_dir": "name the directory of the run without run_dir=",
    "cluster.kind": "a run is resumed where it was submitted; to move it, repeat the command that submitted it, with "
    "run_dir=RUN and another cluster=NAME",
    "pretraining": "its world model already exists",
}


def find_runs_to_resume(args: Namespace) -> RunsToResume | int:
    """Runs to submit again, or the exit code if there are none; prints why other runs are not submitted."""
    words = [word for word in args.runs if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in args.runs if word not in words]
    if not paths:
        raise ConfigurationError(f"{' '.join(words)}: no run directory is given; add the run to change")
    runs = sorted((path.resolve() for path in find_runs(paths)), key=lambda path: path.name)
    newest = {run: job_id for run in runs for job_id in read_job(run).get("job_ids", [])[-1:]}
    states = job_states(newest.values()) if newest else {}
    found, code = [], console.OK
    for run in sorted(runs, key=_waits):
        try:
            config = changed_config(run, words)
            longer = config.training.epochs > load_config(run).training.epochs
            reason = reason_not_to_resume(run, states.get(newest.get(run, "")), failed=args.failed, longer=longer)
        except ConfigurationError as error:
            console.error(f"{run.name}: {error}")
            code = console.FAILED
            continue
        if reason is None:
            found.append((run, config))
        else:
            console.say(f"{run.name}: not resumed, {reason}")
    if not found:
        return code
    require_submitit()
    return RunsToResume(found, typed_keys(words), code)


def changed_config(run: Path, words: Sequence[str]) -> Config:
    """The configuration of a run, changed by the settings on the command line.

    Raises:
        ConfigurationError: if a setting is unknown, out of range or without effect, or would change what the run
            learns.
    """
    stored = load_config(run)
    if not words:
        validate(stored)  # the file may have been edited
        return stored
    config, typed = compose_onto(stored, words)
    for key in typed.keys() & _FIXED.keys():
        raise ConfigurationError(f"{key}={typed[key]} is ignored when a run is resumed; {_FIXED[key]}")
    if "training.epochs" in typed:
        config.training.steps = None
    elif "training.steps" in typed:
        repeat = known_action_repeat(config)
        if config.mode != "online" or repeat is None:
            raise ConfigurationError(
                f"training.steps={config.training.steps}: the steps per epoch of this run are not known; set "
                "training.epochs instead"
            )
        set_epochs(config, repeat)
    differing = keys_preventing_resume(stored, config)
    if differing:
        listed = ", ".join(f"{key} ({old} there)" for key, (old, _) in differing.items())
        raise ConfigurationError(f"{listed}: a run cannot change these; start a new one")
    check_settings_used(replace(config, run_dir=str(run)), typed)
    return config


def reason_not_to_resume(run: Path, job: JobState | None, *, failed: bool, longer: bool = False) -> str | None:
    """Why a run is not submitted again; ``None`` if it should be.

    Args:
        run (Path): its directory.
        job (JobState, optional): SLURM's state of its newest job.
        failed (bool): whether to resume runs that ended with an error, too.
        longer (bool): whether its number of epochs was increased. Defaults to ``False``.
    """
    status = read_summary(run).get("status", "not started")
    if status == "finished" and not longer:
        return "finished"
    if job is not None and not job.ended:
        if job.held:
            return f"job {job.job_id} is held; release it with: scontrol release {job.job_id}"
        return f"job {job.job_id} is {job.state.lower()}"
    owner = open_owner(run)
    if owner is not None and owner_state(owner) != ENDED:
        return f"process {owner.pid} on {owner.host} is training it, or may be"
    if status == "failed" and not failed:
        return "failed; --failed resumes it"
    return None


def _waits(run: Path) -> bool:
    """Whether a run may have to wait for a pre-training, which must then be submitted first."""
    try:
        return load_config(run).world_model is not None
    except ConfigurationError:
        return True  # the error is reported later
