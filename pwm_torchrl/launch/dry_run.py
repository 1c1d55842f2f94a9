"""``launch/submit.py --dry-run``: what would be submitted, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from omegaconf import OmegaConf

from pwm_torchrl.cluster.submission import sbatch_parameters
from pwm_torchrl.launch import console
from pwm_torchrl.launch.prepare import SLURM, Prepared, plan_for_slurm
from pwm_torchrl.training.offline import run_facts

__all__ = ["dry_run"]


def dry_run(runs: Sequence[Prepared], place: str) -> None:
    """Prints the resolved configuration, the memory plan and the sbatch parameters; writes and submits nothing.

    Raises:
        ConfigurationError: as submitting would.
    """
    from pwm_torchrl.devices import pick_device
    from pwm_torchrl.memory.plan import budgets, make_plan, plan_table

    first = runs[0].config
    console.say("# configuration" + ("" if len(runs) == 1 else f" of the first of {len(runs)} runs"))
    console.say(OmegaConf.to_yaml(OmegaConf.create(asdict(first))).rstrip())
    if place == SLURM:
        plans, resources = plan_for_slurm(runs)
    else:
        device = pick_device(first.device)
        limits = budgets(first, str(device) if device.type == "cuda" else None)
        plans = [make_plan(first, run_facts(first), limits)]
    shown: list[str] = []
    for run, plan in zip(runs, plans, strict=False):
        table = plan_table(plan)
        if table not in shown:
            shown.append(table)
            console.say(f"\n# memory plan of model={run.config.model.name} size={run.config.size.name}\n{table}")
    console.say("\n# runs")
    for run in runs:
        console.say("  " + (" ".join(run.words) or "(the defaults)"))
    if place != SLURM:
        console.say(f"\n# submitted to: {place}, no sbatch")
        return
    parameters = sbatch_parameters(first, resources, "pwm_torchrl")
    extra = parameters.pop("additional_parameters")
    console.say("\n# sbatch" + ("" if len(runs) == 1 else f", one array of {len(runs)}"))
    for key, value in sorted({**parameters, **extra}.items()):
        if value not in (None, []) and key not in ("use_srun", "stderr_to_stdout"):
            console.say(f"  {key}: {value}")
