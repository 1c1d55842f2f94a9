"""``launch/plan.py``: a run's memory plan, without the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.launch import console
from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.help import help_text, wants_help

__all__ = ["main"]

_JSON = "--json"


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, plans its memory and prints the plan; ``--json FILE`` writes it too.

    Returns:
        The exit code: 0, or 2 if the configuration is wrong or nothing fits.
    """
    words = list(argv or ())
    if wants_help(words):
        console.say(help_text("plan"))
        return console.OK
    file = _json_file(words)
    config = compose(words)
    from pwm_torchrl.devices import pick_device
    from pwm_torchrl.memory.plan import budgets, make_plan, plan_table, profile_budgets
    from pwm_torchrl.training.offline import run_facts

    facts = run_facts(config)
    if config.cluster.kind == "slurm":
        limits = profile_budgets(config)
    else:
        device = pick_device(config.device)
        limits = budgets(config, str(device) if device.type == "cuda" else None)
    plan = make_plan(config, facts, limits)
    console.say(plan_table(plan))
    for shortage in plan.shortages():
        console.say(f"warning: memory=fixed will not fit: {shortage}", err=True)
    if file is not None:
        _write(file, json.dumps(plan.as_dict(), indent=2) + "\n")
    return console.OK


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise console.ConfigurationError(f"--json {file} cannot be written: {error.strerror}") from error


def _json_file(words: list[str]) -> Path | None:
    """Takes ``--json FILE`` out of the words.

    Raises:
        ConfigurationError: if the file's name is missing.
    """
    if _JSON not in words:
        return None
    place = words.index(_JSON)
    if place + 1 >= len(words):
        raise console.ConfigurationError("--json needs the name of a file, as in --json plan.json")
    file = Path(words[place + 1])
    del words[place : place + 2]
    return file
