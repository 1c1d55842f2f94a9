"""``launch/submit.py --dry-run``: what would be submitted, and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pwm_torchrl.cluster.resources import Resources, sbatch_parameters
from pwm_torchrl.launch import console
from pwm_torchrl.launch.compose import as_yaml
from pwm_torchrl.launch.modes import length_in_words
from pwm_torchrl.launch.prepare import SLURM, Prepared, plan_for_slurm

__all__ = ["dry_run"]


def dry_run(runs: Sequence[Prepared], place: str) -> None:
    """Prints runs, memory plan, sbatch parameters and, last, the configuration; writes and submits nothing.

    Raises:
        ConfigurationError: as submitting would.
    """
    from pwm_torchrl.devices import pick_device
    from pwm_torchrl.memory.plan import budgets, make_plan, plan_table
    from pwm_torchrl.training.offline import run_facts

    first = runs[0].config
    resources: Resources | None = None
    if place == SLURM:
        plans, resources = plan_for_slurm(runs)
    else:
        device = pick_device(first.device)
        limits = budgets(first, str(device) if device.type == "cuda" else None)
        plans = [make_plan(first, run_facts(first), limits)]
    width = console.width()
    several = "" if len(runs) == 1 else f" of the first of {len(runs)} runs"
    console.say("# runs")
    for run in runs:
        console.say("  " + (" ".join(run.words) or "(the defaults)"))
    console.say(f"\n# length{several}")
    for line in textwrap.wrap(length_in_words(first), width - 2):
        console.say("  " + line)
    shown: list[str] = []
    for run, plan in zip(runs, plans, strict=False):
        table = plan_table(plan, width)
        if table not in shown:
            shown.append(table)
            console.say(f"\n# memory plan of model={run.config.model.name} size={run.config.size.name}\n{table}")
    if resources is None:
        console.say(f"\n# submitted to: {place}, no sbatch")
    else:
        parameters = sbatch_parameters(first, resources, "pwm_torchrl")
        extra = parameters.pop("additional_parameters")
        console.say("\n# sbatch" + ("" if len(runs) == 1 else f", one array of {len(runs)}"))
        for key, value in sorted({**parameters, **extra}.items()):
            if value not in (None, []) and key not in ("use_srun", "stderr_to_stdout"):
                listed = "".join(f"\n    {each}" for each in value) if isinstance(value, list) else f" {value}"
                console.say(f"  {key}:{listed}")
    console.say(f"\n# configuration{several}")
    console.say(as_yaml(first))
