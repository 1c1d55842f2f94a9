"""Everything that is checked and planned before a run is submitted, and what a dry run shows of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pwm_torchrl.cli import console
from pwm_torchrl.cli.complete import complete, expand_tasks, length_in_words
from pwm_torchrl.cli.compose import as_yaml, compose, typed_keys
from pwm_torchrl.cli.requests import Prepared, Request, refuse_shared_directories
from pwm_torchrl.cli.sweeps import EVERY_TASK
from pwm_torchrl.cli.words import JSON, check_slurms_keys
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
from pwm_torchrl.devices import pick_device
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.budget import Budget
from pwm_torchrl.memory.plan import budgets, make_plan, plan_table, profile_budgets
from pwm_torchrl.report.estimate import cost_lines, hardware_of
from pwm_torchrl.run.claims import own_job
from pwm_torchrl.run.loggers import require_logging
from pwm_torchrl.run.stored_episodes import run_facts
from pwm_torchrl.terminal import coloured

__all__ = ["by_cluster", "compose_all", "dry_run", "place_of", "plan", "plan_for_slurm", "refuse_slurms_keys"]

LOCAL, DEBUG, SLURM, HERE = "local", "debug", "slurm", "here"


def compose_all(words: Sequence[str], composed: Sequence[Prepared] = ()) -> list[Prepared]:
    """Every run that a command line asks for, complete and checked.

    Args:
        words (sequence of str): its settings.
        composed (sequence of Prepared): the runs, composed, where ``words`` does not ask for every task. Defaults to
            ``()``: they are composed here.

    Raises:
        ConfigurationError: for whatever cannot work, before anything is written.
    """
    runs = list(composed)
    if not runs or EVERY_TASK in words:
        runs = [Prepared(compose(each), each) for each in expand_tasks(words)]
        refuse_shared_directories(runs)
    for run in runs:
        complete(run.config, run.words)
        require_logging(run.config.logger)
    places = {place_of(run.config) for run in runs}
    if len(places) > 1:
        raise ConfigurationError(f"One command submits to one place, not to {' and '.join(sorted(places))} at once.")
    return runs


def place_of(config: Config) -> str:
    """Where a run goes: ``local``, ``debug``, ``slurm``, or ``here`` inside of an allocation, unless a profile of SLURM
    nodes is chosen, which is queued from there, too.
    """
    kind = config.cluster.kind
    if kind == DEBUG:
        return DEBUG
    if own_job() is not None and not (kind == SLURM and slurm_available()):
        return HERE  # resources are there already; a profile that is named is for a job of its own
    if kind == "auto":
        return SLURM if slurm_available() else LOCAL
    if kind == SLURM and not slurm_available():
        raise ConfigurationError(
            f"cluster={config.cluster.name} describes SLURM nodes, and no SLURM is found here; submit from a "
            "login node of the cluster, or use cluster=local"
        )
    return kind


def refuse_slurms_keys(runs: Sequence[Prepared], place: str) -> None:
    """Refuses what was typed for a job of SLURM, of runs that are none.

    Args:
        runs (sequence of Prepared): runs.
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
        remedy = f"queue a job of its own: {named('submit')} with a profile of SLURM nodes, cluster=NAME"
    for run in runs:
        check_slurms_keys(typed_keys(run.words), f"this run trains {where}", remedy)


def say_unqueued(runs: Sequence[Prepared], place: str) -> None:
    """Say that runs with a profile of SLURM nodes train in place, where they cannot be queued."""
    names = sorted({run.config.cluster.name for run in runs if run.config.cluster.kind == SLURM})
    if place == HERE and names:
        how = "" if len(runs) == 1 else f", {len(runs)} runs one after the other"
        console.say(
            f"cluster={','.join(names)} is not used: no SLURM is found here to queue a job, so this trains in the "
            f"allocation of job {own_job()}{how}",
            err=True,
        )


def plan_for_slurm(runs: Sequence[Prepared], facts: Sequence[EnvInfo | None] = ()) -> tuple[list[Any], Resources]:
    """The memory plan of each run, and resources that are enough for all of them.

    Args:
        runs (sequence of Prepared): of one cluster profile.
        facts (sequence of EnvInfo, optional): what :func:`~pwm_torchrl.cli.preflight.preflight` found out about
            each. Defaults to nothing; what is not known is looked up here.

    Raises:
        ConfigurationError: if a run cannot fit the nodes of its profile.
    """
    plans: dict[str, Any] = {}
    found, resources, here = [], None, site()
    for run, known in itertools.zip_longest(runs, facts[: len(runs)]):
        fill_in_shell(run.config)
        fill_in_node_memory(run.config, here)
        # A seed changes no memory.
        key = json.dumps({**dataclasses.asdict(run.config), "seed": 0}, sort_keys=True, default=str)
        if key not in plans:
            known = known or run_facts(run.config)
            plans[key] = make_plan(run.config, known, profile_budgets(run.config), elsewhere=True)
        needed = resources_for(run.config, plans[key])
        resources = needed if resources is None else resources.covering(needed)
        found.append(plans[key])
    assert resources is not None
    require_fit(runs[0].config.cluster, resources, here)
    return found, resources


def by_cluster(runs: Sequence[Prepared], facts: Sequence[Any] = ()) -> list[tuple[list[Prepared], list[Any]]]:
    """Runs whose cluster settings are the same, with what is known of each: what one array can hold, in order."""
    groups: dict[str, tuple[list[Prepared], list[Any]]] = {}
    for run, known in itertools.zip_longest(runs, facts[: len(runs)]):
        key = json.dumps(dataclasses.asdict(run.config.cluster), sort_keys=True, default=str)
        group = groups.setdefault(key, ([], []))
        group[0].append(run)
        group[1].append(known)
    return list(groups.values())


def fill_in_shell(config: Config) -> None:
    """Fill in what the user's shell says of jobs by ``SBATCH_*``, outside of a job, and the profile does not."""
    if own_job() is not None:  # they are those of the job then
        return
    ignored = take_variables(config.cluster, os.environ)
    sbatch_options(config.cluster)
    if ignored and not _TOLD:
        _TOLD.update(ignored)
        console.say(f"{', '.join(ignored)} of this shell are not taken: a run sets that itself", err=True)


_TOLD: set[str] = set()  # variables that are not taken, told once


def fill_in_node_memory(config: Config, here: Site) -> None:
    """Fill in what nodes have where the profile does not say it, so that a run keeps it for its restarts.

    Raises:
        ConfigurationError: if there are no such nodes.
    """
    cluster = config.cluster
    if cluster.host_gib is None:
        cluster.host_gib = round(node_memory_mb(cluster.partition, here) / 1024, 3)


def dry_run(runs: Sequence[Prepared], place: str) -> None:
    """Prints runs, memory plan, sbatch parameters and, last, the configuration; writes and submits nothing.

    Raises:
        ConfigurationError: as submitting would.
    """
    first = runs[0].config
    facts = run_facts(first)
    device: torch.device | None = None
    arrays: list[tuple[Config, Resources, int]] = []
    if place == SLURM:
        plans = []
        for group, _ in by_cluster(runs):
            found, resources = plan_for_slurm(group)
            plans += found
            arrays.append((group[0].config, resources, len(group)))
        runs = [run for group, _ in by_cluster(runs) for run in group]
    else:
        device = pick_device(first.device)
        plans = [make_plan(first, facts, _budgets_of(first, device))]
    width = console.width()
    several = "" if len(runs) == 1 else f" of the first of {len(runs)} runs"
    console.say("# runs")
    for run in runs:
        console.say("  " + (" ".join(run.words) or "(the defaults)"))
    console.say(f"\n# length{several}")
    for line in textwrap.wrap(length_in_words(first), width - 2):
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


def plan(request: Request) -> int:
    """``launch/plan.py``: plans the memory of a run and prints the plan, parameters and hours; ``--json FILE`` writes
    the plan too.

    Returns:
        The exit code: 0.

    Raises:
        ConfigurationError: if nothing fits.
    """
    (run,) = request.runs
    config = complete(run.config, run.words, without_data=True)
    facts = run_facts(config, without_data=True)
    elsewhere = config.cluster.kind == SLURM
    if not elsewhere:
        check_slurms_keys(
            typed_keys(run.words),
            f"this plan is of this machine (cluster={config.cluster.name})",
            f"choose a profile of SLURM nodes, cluster=NAME; {typed('submit')} --dry-run plans for those found here",
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
    """What this machine offers to a run on one of its devices."""
    return budgets(config, str(device) if device.type == "cuda" else None)
