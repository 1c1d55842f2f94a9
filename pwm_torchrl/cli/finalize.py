"""The part of a configuration that needs files, the user's code, an environment, and therefore torch.

:func:`~pwm_torchrl.cli.compose.compose` checks everything else before, in a fraction of a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields

from pwm_torchrl.algorithm.base import find_algorithm
from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import check_settings_used
from pwm_torchrl.cli.compose import as_yaml, compose, compose_unchecked, keys_to_use
from pwm_torchrl.cli.derived_settings import describe_epoch, known_action_repeat, set_epochs, steps_per_epoch
from pwm_torchrl.cli.run_requests import RunRequest
from pwm_torchrl.cli.sweeps import EVERY_TASK, expand, values_of
from pwm_torchrl.cli.validate import validate
from pwm_torchrl.config import Config, DynamicsConfig
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.envs.tasks import TaskInfo, task_info, task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.modules import world_model_facts
from pwm_torchrl.modules.dynamics.factory import find_dynamics
from pwm_torchrl.run.stored_episodes import run_facts

__all__ = [
    "compose_and_finalize",
    "describe_length",
    "expand_tasks",
    "finalize",
    "show_config",
    "tasks_to_extract",
]  # fmt: skip


def compose_and_finalize(words: Sequence[str]) -> Config:
    """The whole configuration of a run, see :func:`finalize`."""
    return finalize(compose(words), words)


def finalize(config: Config, words: Sequence[str], *, without_data: bool = False) -> Config:
    """Completes a composed configuration in place, and checks that the objects it refers to exist and fit together.

    Args:
        config (Config): result of :func:`~pwm_torchrl.cli.compose.compose`.
        words (sequence of str): the words from which it was composed.

    Keyword Args:
        without_data (bool): whether to accept a pre-training without ``data.path``, to plan it. Defaults to ``False``.

    Returns:
        Config: the same object.

    Raises:
        ConfigurationError: if dynamics, world model, task, episodes or environment are missing or do not fit together.
    """
    if "." in config.model.dynamics.kind:
        find_dynamics(config.model.dynamics.kind)
    find_algorithm(config.algorithm.name)
    if config.mode == "extract":
        _adopt_world_model(config)
        check_settings_used(config, keys_to_use(words))
        validate(config)
    if config.training.steps is not None and known_action_repeat(config) is None:
        set_epochs(config, _action_repeat(config))
    _check_stored(config, without_data)
    return config


def show_config(request: RunRequest) -> int:
    """Prints the complete configuration of a command line's first run."""
    first = request.runs[0]
    console.say(as_yaml(finalize(first.config, first.words)))
    return console.OK


def _adopt_world_model(config: Config) -> None:
    """Write the architecture of the pre-trained world model into the configuration, where users look for it."""
    if config.world_model is None:
        return  # a later check reports it
    facts = world_model_facts(config.world_model)
    spec, model, size = facts.spec, config.model, config.size
    config.world_model_sha256 = facts.sha256 or None  # if the model is not trained yet, set when the run begins
    recompute = model.dynamics.checkpoint_substeps
    known = {field.name for field in fields(DynamicsConfig)}
    options = {key: value for key, value in spec.dynamics.items() if key in known and key != "checkpoint_substeps"}
    model.dynamics = DynamicsConfig(**options, checkpoint_substeps=recompute)  # type: ignore[arg-type]
    model.reward_head, model.num_bins, model.vmin, model.vmax = (
        spec.reward_head,
        spec.num_bins,
        spec.vmin,
        spec.vmax,
    )
    model.termination_head = spec.termination
    size.latent_dim, size.simnorm_dim = spec.latent_dim, spec.simnorm_dim
    size.units, size.encoder_units = list(spec.units), list(spec.encoder_units)
    size.task_dim = spec.task_dim or size.task_dim
    model.name = facts.labels.get("model", {}).get("name", model.name)
    size.name = facts.labels.get("size", {}).get("name", size.name)


def _action_repeat(config: Config) -> int:
    """Environment steps per agent step; for a user's own environment, it is created to find out.

    Raises:
        ConfigurationError: if it cannot be created.
    """
    known = known_action_repeat(config)
    return environment_facts(config.env).action_repeat if known is None else known


def describe_length(config: Config) -> str:
    """The length of a run in epochs and, if it is online, in environment steps."""
    epochs = config.training.epochs
    if config.mode != "online":
        return f"{epochs:,} epochs; {describe_epoch(config)}"
    repeat = _action_repeat(config)
    total = epochs * steps_per_epoch(config) * repeat
    asked = "" if config.training.steps is None else f" (training.steps={config.training.steps:,})"
    each = "" if repeat == 1 else f", {repeat} environment steps each"
    return f"{epochs:,} epochs = {total:,} environment steps{asked}; {describe_epoch(config)}{each}"


def _check_stored(config: Config, without_data: bool = False) -> None:
    """Checks that the stored episodes, world model, tasks and simulator of a run fit together.

    Raises:
        ConfigurationError: if they do not.
    """
    if config.mode == "online":
        return
    if config.mode == "extract" and config.task is not None and config.training.eval_episodes:
        _require_simulator(task_info(config.task))
    run_facts(config, without_data)


def _require_simulator(task: TaskInfo) -> None:
    library = task.extra.replace("-", "_")
    if library and importlib.util.find_spec(library) is None:
        raise MissingLibraryError(
            f"evaluating task={task.name} needs {library}, which is not installed: pip install "
            f"'pwm-torchrl[{task.extra}]', or set training.eval_episodes=0 to extract without evaluation"
        )


def expand_tasks(words: Sequence[str]) -> list[list[str]]:
    """Like :func:`~pwm_torchrl.cli.sweeps.expand`, with one run for every task that ``task=all`` stands for.

    Raises:
        ConfigurationError: as :func:`~pwm_torchrl.cli.sweeps.expand` and :func:`tasks_to_extract`.
    """
    if EVERY_TASK not in words:
        return expand(words)
    first = [values_of(word)[0] for word in words if word != EVERY_TASK]  # other sweeps do not change the tasks
    return expand(words, tasks_to_extract(compose_unchecked(first)))


def tasks_to_extract(config: Config) -> list[str]:
    """The tasks that ``task=all`` stands for: those of the world model, or the subset that ``tasks`` names.

    Raises:
        ConfigurationError: without a world model, or with tasks that it does not have.
    """
    if config.mode != "extract" or config.world_model is None:
        raise ConfigurationError(
            "task=all extracts a policy for every task of a pre-trained world model; set world_model=DIRECTORY, the "
            "directory of a pre-training run (experiment=mt30_pretrain) or of an imported checkpoint, and "
            "experiment=extract, mt30 or mt80"
        )
    known = world_model_facts(config.world_model).task_names
    names = known if config.tasks is None else task_set(config.tasks).names
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigurationError(
            f"world_model={config.world_model} was not trained on {', '.join(missing)}; it has {', '.join(known)}"
        )
    return list(names)
