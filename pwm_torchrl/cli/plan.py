"""``launch/plan.py``: a run's memory plan, parameters and hours, without the run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.help import answered
from pwm_torchrl.cli.words import JSON, read_words
from pwm_torchrl.terminal import coloured

__all__ = ["main"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, plans its memory, and prints the plan, parameters and hours; ``--json FILE`` writes it.

    Returns:
        The exit code: 0, or 2 if the configuration is wrong or nothing fits.
    """
    line = read_words("plan", argv or ())
    if answered("plan", line):
        return console.OK
    file = Path(line.options[JSON]) if JSON in line.options else None
    config = compose(line.settings, without_data=True)
    from pwm_torchrl.devices import pick_device
    from pwm_torchrl.memory import plan as memory_plan
    from pwm_torchrl.report import estimate
    from pwm_torchrl.run.stored_episodes import run_facts

    facts, device = run_facts(config, without_data=True), None
    if config.cluster.kind == "slurm":
        limits = memory_plan.profile_budgets(config)
    else:
        device = pick_device(config.device)
        limits = memory_plan.budgets(config, str(device) if device.type == "cuda" else None)
    plan = memory_plan.make_plan(config, facts, limits, elsewhere=config.cluster.kind == "slurm")
    console.say(memory_plan.plan_table(plan, console.width()))
    console.say("")
    for text in estimate.cost_lines(config, facts, estimate.hardware_of(config, device), device):
        console.say("\n".join(textwrap.wrap(text, console.width(), subsequent_indent="  ")))
    for shortage in plan.shortages():
        console.say(f"{coloured('warning', err=True)}: memory=fixed will not fit: {shortage}", err=True)
    if file is not None:
        _write(file, json.dumps(plan.as_dict(), indent=2) + "\n")
    return console.OK


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise console.ConfigurationError(f"--json {file} cannot be written: {error.strerror}") from error
