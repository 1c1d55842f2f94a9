"""Checks and plans before a run begins or is submitted, and the output of a dry run.

Everything that a run needs is checked here, for all commands, before anything is written. Otherwise, a run that cannot
begin would leave a directory that ``status`` and ``report`` list forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import JSON, check_no_slurm_keys
from pwm_torchrl.cli.compose import as_yaml, compose, typed_keys
from pwm_torchrl.cli.finalize import describe_length, expand_tasks, finalize
from pwm_torchrl.cli.run_requests import ComposedRun, RunRequest, refuse_shared_directories
from pwm_torchrl.cli.sweeps import EVERY_TASK
from pwm_torchrl.cluster.resources import (
    Resources,
    node_memory_mb,
    require_fit,
    resources_for,
    sbatch_options,
    sbatch_parameters,
    take_variables,
)
from pwm_torchrl.cluster.slurm import Site, site, slurm_available
from pwm_torchrl.commands import named, typed
from pwm_torchrl.config import Config
from pwm_torchrl.devices import environment_device, pick_device
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.envs.facts import opened_facts, report_env, require_maker
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, MissingLibraryError, is_ours
from pwm_torchrl.memory.budget import Budget
from pwm_torchrl.memory.plan import budgets, make_plan, plan_table, profile_budgets
from pwm_torchrl.report.estimate import cost_lines, hardware_of
from pwm_torchrl.run.claims import own_job
from pwm_torchrl.run.directory import check_run_dir
from pwm_torchrl.run.load import check_warm_start
from pwm_torchrl.run.loggers import require_logging
from pwm_torchrl.run.stored_episodes import (
    check_horizon,
    require_slices,
    require_world_model,
    run_facts,
    scratch_directory,
)
from pwm_torchrl.terminal import coloured

__all__ = [
    "check_env",
    "compose_all",
    "dry_run",
    "group_by_cluster",
    "place_of",
    "plan",
    "plan_for_slurm",
    "preflight",
    "refuse_slurm_keys",
    "settle_place",
]

# Composing, choosing a place and planning -----------------------------------------------------------------------------


LOCAL, DEBUG, SLURM, HERE = "local", "debug", "slurm", "here"


def compose_all(words: Sequence[str], composed: Sequence[ComposedRun] = ()) -> list[ComposedRun]:
    """All runs of a command line, complete and checked.

    Args:
        words (sequence of str): the settings.
        composed (sequence of ComposedRun): the composed runs; not used if ``words`` contains ``task=all``. Defaults to
            ``()``: they are composed here.

    Raises:
        ConfigurationError: if a run cannot work; nothing has been written then.
    """
    runs = list(composed)
    if not runs or EVERY_TASK in words:
        runs = [ComposedRun(compose(each), each) for each in expand_tasks(words)]
        refuse_shared_directories(runs)
    places = set()
    for run in runs:
        finalize(run.config, run.words)
        place = place_of(run.config)
        with _may_be_set_up(run.config, place):
            require_logging(run.config.logger)
        places.add(place)
    if len(places) > 1:
        raise ConfigurationError(f"One command submits to one place, not to {' and '.join(sorted(places))} at once.")
    return runs


def place_of(config: Config) -> str:
    """The place of a run: ``local`` (a job on this machine), ``debug`` (this process), ``slurm`` (a SLURM job), or
    ``here`` (this process, in a SLURM allocation).

    A profile of SLURM nodes is queued as a job also from inside an allocation.

    Raises:
        ConfigurationError: for a profile of SLURM nodes on a machine without SLURM.
    """
    kind = config.cluster.kind
    if kind == DEBUG:
        return DEBUG
    if own_job() is not None and not (kind == SLURM and slurm_available()):
        return HERE  # the allocation has resources already; a named profile stands for a separate job
    if kind == "auto":
        return SLURM if slurm_available() else LOCAL
    if kind == SLURM and not slurm_available():
        raise ConfigurationError(
            f"cluster={config.cluster.name} describes SLURM nodes, but SLURM was not found on this machine; submit "
            "from a login node of the cluster, or use cluster=local"
        )
    return kind


def settle_place(runs: Sequence[ComposedRun]) -> str:
    """The place of a command's runs, see :func:`place_of`, after reporting what has no effect there.

    A message names profiles of SLURM nodes that are not used.

    Raises:
        ConfigurationError: for a setting that only SLURM jobs use, if there is no SLURM job.
    """
    place = place_of(runs[0].config)
    refuse_slurm_keys(runs, place)
    names = sorted({run.config.cluster.name for run in runs if run.config.cluster.kind == SLURM})
    if place == HERE and names:
        how = "" if len(runs) == 1 else f", {len(runs)} runs one after the other"
        console.say(
            f"cluster={','.join(names)} is ignored: SLURM was not found, so no job can be queued and this trains in "
            f"the allocation of job {own_job()}{how}",
            err=True,
        )
    return place


def refuse_slurm_keys(runs: Sequence[ComposedRun], place: str) -> None:
    """Rejects settings for SLURM jobs if the runs are not SLURM jobs.

    Args:
        runs (sequence of ComposedRun): the runs.
        place (str): where they train, see :func:`place_of`.

    Raises:
        ConfigurationError: for the first such key.
    """
    if place == SLURM:
        return
    job = own_job() if place == HERE else None
    where = "on this machine" if place == LOCAL else "in this process"
    remedy = f"give it to {named('submit')} where SLURM is found"
    if job is not None:
        where = f"in the allocation of job {job}"
        remedy = f"queue a separate job: {named('submit')} with a profile of SLURM nodes, cluster=NAME"
    for run in runs:
        check_no_slurm_keys(typed_keys(run.words), f"this run trains {where}", remedy)


def plan_for_slurm(runs: Sequence[ComposedRun], facts: Sequence[EnvInfo | None] = ()) -> tuple[list[Any], Resources]:
    """The memory plan of each run, and resources that are sufficient for all of them.

    Args:
        runs (sequence of ComposedRun): runs with the same cluster profile.
        facts (sequence of EnvInfo, optional): facts of each run from :func:`~pwm_torchrl.cli.prepare.preflight`.
            Defaults to nothing; missing facts are read here.

    Raises:
        ConfigurationError: if a run does not fit the nodes of its profile.
    """
    plans: dict[str, Any] = {}
    found, resources, here = [], None, site()
    for run, known in itertools.zip_longest(runs, facts[: len(runs)]):
        fill_from_shell(run.config)
        fill_in_node_memory(run.config, here)
        # The seed does not change the memory plan.
        key = json.dumps({**dataclasses.asdict(run.config), "seed": 0}, sort_keys=True, default=str)
        if key not in plans:
            known = known or run_facts(run.config)
            plans[key] = make_plan(run.config, known, profile_budgets(run.config), elsewhere=True)
        needed = resources_for(run.config, plans[key])
        resources = needed if resources is None else resources.maximum(needed)
        found.append(plans[key])
    assert resources is not None
    require_fit(runs[0].config.cluster, resources, here)
    return found, resources


def group_by_cluster(
    runs: Sequence[ComposedRun], facts: Sequence[Any] = ()
) -> list[tuple[list[ComposedRun], list[Any]]]:
    """Runs grouped by their cluster settings, with the facts of each; a group can be submitted as one array."""
    groups: dict[str, tuple[list[ComposedRun], list[Any]]] = {}
    for run, known in itertools.zip_longest(runs, facts[: len(runs)]):
        key = json.dumps(dataclasses.asdict(run.config.cluster), sort_keys=True, default=str)
        group = groups.setdefault(key, ([], []))
        group[0].append(run)
        group[1].append(known)
    return list(groups.values())


def fill_from_shell(config: Config) -> None:
    """Fill settings that the profile leaves open from the shell's variables ``SBATCH_*``, outside of a job."""
    if own_job() is not None:  # the variables then belong to that job
        return
    ignored = take_variables(config.cluster, os.environ)
    sbatch_options(config.cluster)
    if ignored and not _TOLD:
        _TOLD.update(ignored)
        console.say(f"{', '.join(ignored)} of this shell are ignored: a run sets these options itself", err=True)


_TOLD: set[str] = set()  # ignored variables, which are reported once


def fill_in_node_memory(config: Config, here: Site) -> None:
    """Set the nodes' memory in a profile without it, so that a run keeps the same value for its restarts.

    Raises:
        ConfigurationError: if there are no such nodes.
    """
    cluster = config.cluster
    if cluster.host_gib is None:
        cluster.host_gib = round(node_memory_mb(cluster.partition, here) / 1024, 3)


# Checking what a run needs --------------------------------------------------------------------------------------------


def preflight(configs: Sequence[Config], place: str, *, again: bool = False) -> list[EnvInfo | None]:
    """Check everything that the runs of a command need, for all runs before the first directory is created.

    Checks the libraries, the devices, the run directories, stored episodes and world models, the key of W&B, and the
    environment, which is created once, read and closed.

    A run on this machine is checked against this machine. A SLURM job is checked on the login node, which has the same
    libraries and files but not the same GPU: ``cuda`` is checked against the cluster profile. An environment on a GPU,
    ``env.device=cuda``, is not created for a job; only its ``_target_`` and library are checked. (For a job on this
    machine, this process would otherwise occupy part of the GPU.) If a profile has lines of ``cluster.setup``, missing
    libraries are accepted, because those lines may provide them.

    Args:
        configs (sequence of Config): composed runs.
        place (str): where they will train, see :func:`~pwm_torchrl.cli.prepare.place_of`.

    Keyword Args:
        again (bool): whether these are existing runs that are resumed. Under SLURM, their environments are then not
            created, because the job imports its own copy of their code. Defaults to ``False``.

    Returns:
        list of EnvInfo: facts of each run's environment or tasks; ``None`` if the environment was not created.

    Raises:
        ConfigurationError: for the first thing that is missing, with the key that needs it.
    """
    for config in configs:
        with _may_be_set_up(config, place):
            _check_libraries(config)
        _check_devices(config, place)
        if not again:
            check_run_dir(config)
    opened: dict[str, EnvInfo] = {}
    facts: list[EnvInfo | None] = []
    for config in configs:
        found = _check_data(config, place)
        made = None
        if _acts(config) and not (again and place == SLURM):
            with _may_be_set_up(config, place):
                made = _open_environment(config, place, opened)
        facts.append(made if config.mode == "online" else found)
    return facts


def _acts(config: Config) -> bool:
    """Whether a run uses environments."""
    return config.mode == "online" or (config.mode == "extract" and config.training.eval_episodes > 0)


@contextlib.contextmanager
def _may_be_set_up(config: Config, place: str) -> Iterator[None]:
    """Ignore missing libraries in the block for a SLURM job whose profile has ``cluster.setup``."""
    try:
        yield
    except MissingLibraryError:
        if place != SLURM or not config.cluster.setup:
            raise


def _check_libraries(config: Config) -> None:
    require_logging(config.logger)
    if config.training.video and _acts(config) and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise MissingLibraryError(
            "training.video=true needs imageio-ffmpeg, which is not installed: pip install 'pwm-torchrl[video]', or "
            "set training.video=false"
        )


def _check_devices(config: Config, place: str) -> None:
    if place != SLURM:
        pick_device(config.device)
        environment_device(config)
        return
    for key, device in (("device", config.device), ("env.device", config.env.get("device"))):
        if str(device).startswith("cuda") and config.cluster.gpu is None:
            raise ConfigurationError(
                f"{key}={device} needs a GPU, and cluster={config.cluster.name} has none; set cluster.gpu, or choose "
                "another cluster."
            )


def _check_data(config: Config, place: str) -> EnvInfo | None:
    """Check the stored episodes, world model and warm start of a run; returns the facts of a run on stored episodes."""
    if config.init_from is not None:
        check_warm_start(config)
    if config.mode == "online":
        return None
    facts = run_facts(config)
    require_slices(config)
    if place != SLURM:  # a SLURM job may wait for its world model, and has its node's disk
        require_world_model(config)
        if config.data.stage == "scratch":
            scratch_directory(config)
    return facts


def _open_environment(config: Config, place: str, opened: dict[str, EnvInfo]) -> EnvInfo | None:
    """Facts of a run's environment, which is created once for all runs that share it; ``None`` if it is not created."""
    if str(config.env.get("device") or "").startswith("cuda") and place in (LOCAL, SLURM):
        require_maker(config.env)
        return None
    sizes = {"training.eval_episodes": max(1, config.training.eval_episodes)}
    if config.mode == "online":
        sizes = {"env.num_envs": int(config.env["num_envs"]), **sizes}
    key = json.dumps([config.env, sizes], sort_keys=True, default=str)
    if key not in opened:
        try:
            with _graphics_as_before():
                opened[key] = opened_facts(config.env, sizes, device=environment_device(config))
        except EnvironmentFault as fault:
            raise ConfigurationError(f"env._target_={config.env['_target_']} cannot be used: {fault}") from fault
    if config.mode == "online":
        check_horizon(config, opened[key])
    return opened[key]


@contextlib.contextmanager
def _graphics_as_before() -> Iterator[None]:
    """Restore ``MUJOCO_GL`` after the block, so that jobs do not inherit the backend chosen for this machine."""
    before = os.environ.get("MUJOCO_GL")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MUJOCO_GL", None)


# Commands that only print: a dry run, a plan, an environment ----------------------------------------------------------


def dry_run(runs: Sequence[ComposedRun], place: str) -> None:
    """Prints runs, memory plan, sbatch parameters and configuration; writes and submits nothing.

    Raises:
        ConfigurationError: as submitting them would.
    """
    first = runs[0].config
    facts = run_facts(first)
    device: torch.device | None = None
    arrays: list[tuple[Config, Resources, int]] = []
    if place == SLURM:
        plans = []
        for group, _ in group_by_cluster(runs):
            found, resources = plan_for_slurm(group)
            plans += found
            arrays.append((group[0].config, resources, len(group)))
        runs = [run for group, _ in group_by_cluster(runs) for run in group]
    else:
        device = pick_device(first.device)
        plans = [make_plan(first, facts, _budgets_of(first, device))]
    width = console.width()
    several = "" if len(runs) == 1 else f" of the first of {len(runs)} runs"
    console.say("# runs")
    for run in runs:
        console.say("  " + (" ".join(run.words) or "(the defaults)"))
    console.say(f"\n# length{several}")
    for line in textwrap.wrap(describe_length(first), width - 2):
        console.say("  " + line)
    for line in cost_lines(first, facts, hardware_of(first, device), device):
        console.say("\n".join(textwrap.wrap(line, width - 2, initial_indent="  ", subsequent_indent="    ")))
    shown: list[str] = []
    for run, plan in zip(runs, plans, strict=False):
        table = plan_table(plan, width)
        if table not in shown:
            shown.append(table)
            console.say(f"\n# memory plan of model={run.config.model.name} size={run.config.size.name}\n{table}")
    if not arrays:
        console.say(f"\n# submitted to: {place}, no sbatch")
    for config, resources, count in arrays:
        parameters = sbatch_parameters(config, resources, "pwm_torchrl")
        extra = parameters.pop("additional_parameters")
        console.say("\n# sbatch" + ("" if count == 1 else f", one array of {count}"))
        for key, value in sorted({**parameters, **extra}.items()):
            if value not in (None, []) and key not in ("use_srun", "stderr_to_stdout"):
                listed = "".join(f"\n    {each}" for each in value) if isinstance(value, list) else f" {value}"
                console.say(f"  {key}:{listed}")
    console.say(f"\n# configuration{several}")
    console.say(as_yaml(first))


def plan(request: RunRequest) -> int:
    """``launch/plan.py``: prints a run's memory plan, parameters and hours; ``--json FILE`` also writes the plan.

    Returns:
        The exit code: 0.

    Raises:
        ConfigurationError: if nothing fits.
    """
    (run,) = request.runs
    config = finalize(run.config, run.words, without_data=True)
    facts = run_facts(config, without_data=True)
    elsewhere = config.cluster.kind == SLURM
    if not elsewhere:
        check_no_slurm_keys(
            typed_keys(run.words),
            f"this plan is for this machine (cluster={config.cluster.name})",
            f"choose a profile of SLURM nodes, cluster=NAME; {typed('submit')} --dry-run plans for the cluster's nodes",
        )
    device = None if elsewhere else pick_device(config.device)
    limits = profile_budgets(config) if device is None else _budgets_of(config, device)
    made = make_plan(config, facts, limits, elsewhere=elsewhere)
    console.say(plan_table(made, console.width()))
    console.say("")
    for text in cost_lines(config, facts, hardware_of(config, device), device):
        console.say("\n".join(textwrap.wrap(text, console.width(), subsequent_indent="  ")))
    for shortage in made.shortages():
        console.say(f"{coloured('warning', err=True)}: memory=fixed will not fit: {shortage}", err=True)
    if JSON in request.line.options:
        file = Path(request.line.options[JSON])
        try:
            file.write_text(json.dumps(made.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--json {file} cannot be written: {error.strerror}") from error
    return console.OK


def _budgets_of(config: Config, device: torch.device) -> dict[str, Budget]:
    """The memory budgets of this machine for a run on a device."""
    return budgets(config, str(device) if device.type == "cuda" else None)


def check_env(request: RunRequest) -> int:
    """``launch/check_env.py``: creates the environment of a run and prints what training sees of it.

    Returns:
        The exit code: 0, or 1 if no run can use it.
    """
    (run,) = request.runs
    try:
        console.say(report_env(run.config.env, run.config.env["num_envs"]))
        console.say(f"{coloured('ok')}: a run can use this environment")
    except Exception as failure:
        if not is_ours(failure) or isinstance(failure, ConfigurationError):
            raise
        console.error(str(failure))
        return console.FAILED
    return console.OK
