"""Networks as files: ``launch/world_model.py`` shows and imports them, ``launch/hub.py`` exports and uploads them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pwm_torchrl.choices import sizes
from pwm_torchrl.cli import console
from pwm_torchrl.envs.tasks import TaskSet, task_set
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModelSpec, load_tdmpc2_world_model, save_world_model, world_model_facts
from pwm_torchrl.run import publish

__all__ = ["hub", "import_checkpoint", "world_model"]

# launch/world_model.py ------------------------------------------------------------------------------------------------


def world_model(args: Namespace) -> int:
    """Imports a checkpoint, or describes a saved world model."""
    if args.command == "import":
        tasks = None if args.tasks is None else task_set(args.tasks)
        return import_checkpoint(args.checkpoint, args.folder, tasks)
    return _show(args.folder)


def import_checkpoint(checkpoint: Path, folder: Path, tasks: TaskSet | None) -> int:
    """Convert a TD-MPC2 checkpoint, and print how its entries were mapped."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; give a new folder")
    model, report = load_tdmpc2_world_model(checkpoint, action_dims=None if tasks is None else tasks.action_dims)
    spec = report.spec
    if tasks is not None:
        _check_tasks(checkpoint, tasks, spec)
    elif spec.num_tasks:
        raise ConfigurationError(
            f"{checkpoint} has {spec.num_tasks} tasks but does not name them; name them in order, such as --tasks mt30"
        )
    saved = save_world_model(
        folder,
        model,
        spec,
        task_names=() if tasks is None else tasks.names,
        observation_dims=() if tasks is None else tasks.observation_dims,
        labels={"origin": checkpoint.name, "model": {"name": "mlp"}, "size": {"name": size_name(spec.units)}},
    )
    console.say(f"mapped {len(report.mapped)} entries:")
    for theirs, ours in report.mapped.items():
        console.say(f"  {theirs:<36} -> {ours}")
    console.say(f"left out {len(report.skipped)} entries of policy and value networks: {_short(report.skipped)}")
    console.say(f"missing: {', '.join(report.missing) or 'nothing'}")
    console.say(f"world model: {folder} (sha256 {saved.sha256[:12]})")
    return console.OK


def _check_tasks(checkpoint: Path, tasks: TaskSet, spec: WorldModelSpec) -> None:
    number, widths = spec.num_tasks, (spec.observation_dim, spec.action_dim)
    if number != len(tasks):
        raise ConfigurationError(f"{checkpoint} has {number} tasks, and --tasks {tasks.name} has {len(tasks)}")
    if widths != (tasks.observation_dim, tasks.action_dim):
        raise ConfigurationError(
            f"{checkpoint} takes {widths[0]} observation and {widths[1]} action dimensions, and --tasks {tasks.name} "
            f"has {tasks.observation_dim} and {tasks.action_dim}: it was trained on other tasks"
        )


def size_name(units: Sequence[int]) -> str:
    """The name of the published size with these hidden widths, else ``custom``."""
    return next((name for name, size in sizes().items() if size.units == list(units)), "custom")


def _short(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "none"


def _show(folder: Path) -> int:
    facts = world_model_facts(folder)
    for key, value in asdict(facts.spec).items():
        console.say(f"{key:<24} {value}")
    console.say(f"{'tasks':<24} {', '.join(facts.task_names) or 'a single one'}")
    console.say(f"{'sha256':<24} {facts.sha256 or 'not trained yet'}")
    return console.OK


# launch/hub.py --------------------------------------------------------------------------------------------------------


def hub(args: Namespace) -> int:
    """Exports or uploads a run."""
    if args.command == "export":
        if args.folder.exists() and any(args.folder.iterdir()):
            raise ConfigurationError(f"{args.folder} is not empty; give a new folder")
        for file in publish.export_run(args.run, args.folder, args.checkpoint):
            console.say(str(file))
        return console.OK
    url = publish.push_run(args.run, args.repository, args.checkpoint, private=args.private, message=args.message)
    console.say(f"uploaded: {url}")
    console.say(f'load_policy("hf://{args.repository}") loads it')
    return console.OK
