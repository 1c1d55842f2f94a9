"""``launch/submit.py``: submits runs as jobs, to SLURM if it is found, else on this machine.

``task=all`` without a world model has two stages: a pre-training, then the extraction of a policy for every task from
its world model.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import DRY_RUN, check_no_slurm_keys
from pwm_torchrl.cli.finalize import finalize
from pwm_torchrl.cli.local import refuse_while_running, stop_signals_as_interrupt, submit_local
from pwm_torchrl.cli.prepare import (
    DEBUG,
    HERE,
    LOCAL,
    SLURM,
    compose_all,
    dry_run,
    group_by_cluster,
    plan_for_slurm,
    preflight,
    settle_place,
)
from pwm_torchrl.cli.resume import RunsToResume
from pwm_torchrl.cli.run_requests import ComposedRun, RunRequest, compose_pretraining, lacks_world_model, split_stages
from pwm_torchrl.cli.train import run_in_process
from pwm_torchrl.cluster.job import LOG_FILE
from pwm_torchrl.cluster.resources import Resources, require_fit, resources_again
from pwm_torchrl.cluster.restarts import JOB_FILE, read_job, save_smaller_plan
from pwm_torchrl.cluster.slurm import live_job, site, slurm_available
from pwm_torchrl.cluster.snapshot import snapshot, targets_of
from pwm_torchrl.cluster.submission import last_request, resubmit, submit_runs, unpin_world_model
from pwm_torchrl.commands import typed_here
from pwm_torchrl.config import Config
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import RunDir, discard, prepare_run_dir, read_summary
from pwm_torchrl.run.stored_episodes import follow_world_model
from pwm_torchrl.run.validation import write_model_description
from pwm_torchrl.user_code import make_cwd_importable

__all__ = ["TwoStageRuns", "compose_stages", "refuse_while_queued", "resume", "run"]


def run(request: RunRequest) -> int:
    """Submits runs, and on this machine follows them to their end.

    Returns:
        The exit code: 0 finished or queued, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130
        stopped; of several runs the highest.
    """
    dry = DRY_RUN in request.line.options
    if lacks_world_model(request.words):
        with compose_stages(request.words) as stages:
            return _both_stages(stages, dry)
    runs = compose_all(request.words, request.runs)
    place = settle_place(runs)
    if dry:
        dry_run(runs, place)
        return console.OK
    facts = preflight([run.config for run in runs], place)
    if place == SLURM:
        return _to_slurm([runs], [facts])
    return _all(runs, place)


def _all(runs: Sequence[ComposedRun], place: str) -> int:
    """Train runs on this machine one after the other, then print the next commands for the last one that finished."""
    codes, finished = [], None
    for run in runs:
        if run.config.run_dir is not None:
            refuse_while_running(Path(run.config.run_dir).expanduser().absolute())
        prepared = _prepare(run.config, place)
        codes.append(_here(run, prepared, place))
        if codes[-1] == console.OK:
            finished = prepared.path
    if finished is not None:
        console.say(console.next_lines(runs[0].config.mode, finished, runs[0].config.data.path))
    return max(codes)


def _prepare(config: Config, place: str) -> RunDir:
    """Create or check the directory of a run; for a pre-training, also write the description of its world model."""
    prepared = prepare_run_dir(config, here=place in (DEBUG, HERE))
    if config.mode == "pretrain":
        write_model_description(config, prepared.path)
    return prepared


def _here(run: ComposedRun, prepared: RunDir, place: str) -> int:
    """Train a run whose directory exists on this machine, or in this process; returns the exit code."""
    config = run.config
    if place in (DEBUG, HERE):
        return run_in_process(config, prepared, run.words, script="submit")
    console.say(f"{'resuming' if prepared.resume else 'run'}: {prepared.path}")
    try:
        return _follow(config, prepared, run.words)
    except ConfigurationError:
        discard(prepared)
        raise


def _follow(config: Config, run: RunDir, words: Sequence[str]) -> int:
    """Follow a job on this machine; each time memory runs out, start it again with a plan that needs less."""
    code = snapshot(run.path.parent, targets_of(asdict(config)))
    with stop_signals_as_interrupt():
        while True:
            outcome = submit_local(run.path, code, progress=config.training.progress).follow()
            change = save_smaller_plan(run.path, config, outcome)
            if change is None:
                return _conclude(outcome, run, words)
            console.say(f"memory ran out, so the run continues with {change}")


def _to_slurm(
    stages: Sequence[Sequence[ComposedRun]],
    facts: Sequence[Sequence[EnvInfo | None]],
    placed: Callable[[Path], None] = lambda run_dir: None,
) -> int:
    """Queue all runs, with one array per stage and profile; everything is checked and planned before it is written.

    Args:
        stages (sequence of sequences of ComposedRun): runs.
        facts (sequence of sequences of EnvInfo): facts of each run, see
            :func:`~pwm_torchrl.cli.prepare.preflight`.
        placed (callable): called with the first run's directory before later stages are queued.
    """
    arrays = [group_by_cluster(stage, known) for stage, known in zip(stages, facts, strict=True)]
    planned = [[plan_for_slurm(runs, known)[1] for runs, known in stage] for stage in arrays]
    for run in itertools.chain(*stages):
        if run.config.run_dir is not None:
            refuse_while_queued(Path(run.config.run_dir).expanduser().absolute())
    folders: list[Path] = []
    for stage, needed in zip(arrays, planned, strict=True):
        for (runs, _), resources in zip(stage, needed, strict=True):
            folders += _queue(runs, resources)
            placed(folders[0])
    what = "it" if len(folders) == 1 else "them"
    where = folders[0] if len(folders) == 1 else folders[0].parent
    names = ", ".join(dict.fromkeys(run.config.cluster.name for stage in stages for run in stage))
    console.say(f"queued on cluster={names}; watch {what} with: {typed_here('status')} {where}")
    return console.OK


def _queue(runs: Sequence[ComposedRun], resources: Resources) -> list[Path]:
    """Queue runs as one array; returns their directories, which are deleted again if SLURM rejects the array."""
    configs = [run.config for run in runs]
    for config in configs:
        unpin_world_model(config)
    made: list[RunDir] = []
    try:
        for config in configs:
            made.append(_prepare(config, SLURM))
        folders = [each.path for each in made]
        parent = folders[0].parent
        code = snapshot(parent, (name for config in configs for name in targets_of(asdict(config))))
        submitted = submit_runs(folders, configs, resources, code, parent)
    except ConfigurationError:
        for run in made:
            if not read_job(run.path):  # an earlier array of the same command may be queued
                discard(run)
        raise
    for each in submitted:
        waits = "" if each.after is None else f", after job {each.after}"
        console.say(f"job {each.job_id}: {each.run_dir}{waits}")
    return folders


def refuse_while_queued(run_dir: Path) -> None:
    """Reject a second job for a run directory: it would wait for the first one and then find the run finished.

    Raises:
        ConfigurationError: if a job of the run is queued or runs.
    """
    job = live_job(run_dir)
    if job is not None:
        raise ConfigurationError(
            f"run_dir={run_dir} has SLURM job {job.job_id}, which is {job.state.lower()}; wait for it, or cancel it "
            f"with: scancel {job.job_id}"
        )


def _conclude(outcome: dict[str, Any], run: RunDir, words: Sequence[str]) -> int:
    """Print the last lines of a run on this machine; returns the exit code."""
    status, run_dir = outcome["status"], run.path
    summary = read_summary(run_dir) or outcome.get("summary") or {}
    if status == "finished":
        console.say(console.summary_line(summary, run_dir))
        return console.OK
    if status == "stopped":
        console.say(console.summary_line({**summary, "status": "stopped"}, run_dir))
        console.say(console.resume_hint("submit", words, run_dir), err=True)
        return console.STOPPED
    refused = bool(outcome.get("bad_input"))
    where = "" if refused and discard(run) else f"\nfull log: {run_dir / LOG_FILE}"
    message = f"{outcome.get('error', f'the run ended with status {status}')}{where}"
    code = console.fail(message, status, "submit", words, run_dir)
    return console.BAD_INPUT if refused else code


# Two stages: task=all without a world model ---------------------------------------------------------------------------


@dataclass
class TwoStageRuns:
    """The runs of a command with two stages.

    Attributes:
        pretraining (ComposedRun): trains the world model.
        policies (list of ComposedRun): extractions that use it.
        folder (Path): folder with the description of the world model until the pre-training has its directory.
    """

    pretraining: ComposedRun
    policies: list[ComposedRun]
    folder: Path

    def set_world_model(self, run_dir: Path) -> None:
        """Set the pre-training's directory as the path of the policies' world model."""
        for each in self.policies:
            each.config.world_model = str(run_dir)
            each.words[:] = [
                f"world_model={run_dir}" if word.startswith("world_model=") else word for word in each.words
            ]

    @property
    def description(self) -> str:
        """Description of the command in one line."""
        count = len(self.policies)
        what = "then a policy for its task" if count == 1 else f"then {count} policies in it"
        return f"no world_model is given: {self.pretraining.words[0]} trains one first, {what}"


@contextlib.contextmanager
def compose_stages(words: Sequence[str]) -> Iterator[TwoStageRuns]:
    """Both stages, composed and checked; nothing is written to the folder of the runs.

    Raises:
        ConfigurationError: if a run of either stage cannot work.
    """
    own, rest = split_stages(words)
    pretraining = compose_pretraining(own)
    try:
        finalize(pretraining.config, own)
    except ConfigurationError as error:
        raise ConfigurationError(f"in the pre-training: {error}") from error
    with tempfile.TemporaryDirectory(prefix="pwm_torchrl_") as name:
        folder = Path(name) / "world_model_to_come"
        write_model_description(pretraining.config, folder)
        yield TwoStageRuns(pretraining, compose_all([*rest, f"world_model={folder}"]), folder)


def _both_stages(both: TwoStageRuns, dry: bool) -> int:
    """Run or queue a pre-training, then the extractions that use its world model; returns the exit code."""
    place = settle_place([both.pretraining, *both.policies])
    console.say(both.description)
    if dry:
        dry_run([both.pretraining], place)
        console.say("\n\n# the policies, in the world model of the run above\n")
        dry_run(both.policies, place)
        return console.OK
    stages = [[both.pretraining], both.policies]
    facts = [preflight([run.config for run in stage], place) for stage in stages]
    if place == SLURM:
        return _to_slurm(stages, facts, both.set_world_model)
    first = _prepare(both.pretraining.config, place)
    both.set_world_model(first.path)
    code = _here(both.pretraining, first, place)
    if code == console.BAD_INPUT:
        return code
    if code != console.OK:
        words = " ".join(shlex.quote(word) for word in both.policies[0].words if not word.startswith("task="))
        console.say(
            f"no policy was started; after the pre-training has finished: {typed_here('submit')} {words} task=all",
            err=True,
        )
        return code
    return _all(both.policies, place)


# Existing runs --------------------------------------------------------------------------------------------------------


def resume(found: RunsToResume) -> int:
    """Submits unfinished runs again, see :mod:`~pwm_torchrl.cli.resume`.

    Returns:
        The exit code: 0, or 1 if a run could not be submitted; for runs on this machine, the highest one.
    """
    code = found.code
    for run, config in found.runs:
        try:
            said, ended = _bring_back(run, config, found.typed)
        except ConfigurationError as error:
            said, ended = str(error), console.FAILED
        if ended == console.OK:
            console.say(f"{run.name}: {said}")
        else:
            console.error(f"{run.name}: {said}")
        code = max(code, ended)
    return code


def _bring_back(run: Path, cfg: Config, typed: Mapping[str, Any]) -> tuple[str, int]:
    """Submit a run as before, except for the changed keys; returns a description for the user, and the exit code."""
    follow_world_model(cfg, run)
    job = read_job(run)
    if not job and (run / JOB_FILE).exists():
        raise ConfigurationError(
            f"{run / JOB_FILE} is empty or damaged, so the request of its job is lost; delete it, and repeat the "
            f"command that submitted the run, with run_dir={run}"
        )
    on_slurm = bool(job) and slurm_available()
    if cfg.cluster.kind == "slurm" and not on_slurm:
        why = f"it has no {JOB_FILE}" if slurm_available() else "SLURM was not found on this machine"
        raise ConfigurationError(f"the run was submitted with cluster={cfg.cluster.name}, but {why}")
    make_cwd_importable()
    preflight([cfg], SLURM if on_slurm else LOCAL, again=True)
    if on_slurm:
        resources = resources_again(last_request(run, job), cfg, typed)
        require_fit(cfg.cluster, resources, site())
        prepare_run_dir(replace(cfg, run_dir=str(run)))
        return f"job {resubmit(run, cfg, resources, job)}", console.OK
    check_no_slurm_keys(
        typed,
        "this run is resumed on this machine",
        f"repeat the command that started it where SLURM is found, with run_dir={run}",
    )
    prepare_run_dir(replace(cfg, run_dir=str(run)))
    code = snapshot(run.parent, targets_of(asdict(cfg)))
    outcome = submit_local(run, code, progress=cfg.training.progress).follow()
    status = str(outcome["status"])
    reason = "" if outcome.get("error") is None else f": {outcome['error']}; full log: {run / LOG_FILE}"
    return status + reason, console.EXIT_CODES.get(status, console.FAILED)
