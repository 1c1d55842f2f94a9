"""What the mode of a run decides of its configuration, and what runs on stored episodes need before they start."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pwm_torchrl.config import Config, DynamicsConfig
from pwm_torchrl.envs.tasks import TaskInfo, task_info, task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

__all__ = [
    "MODES",
    "action_repeat",
    "apply_mode",
    "apply_steps",
    "check_stored",
    "epoch_in_words",
    "length_in_words",
    "of_world_model",
    "steps_per_epoch",
    "tasks_to_extract",
]

MODES = ("online", "pretrain", "extract")

#: What of ``model`` and ``size`` is no part of a pre-trained world model.
OPEN_IN_EXTRACTION = ("model.reward_space", "model.loss.", "model.dynamics.checkpoint_substeps", "model.name")
OPEN_SIZES = ("size.actor_units", "size.critic_units", "size.num_critics", "size.name")


def of_world_model(key: str) -> bool:
    """Whether a key of the command line is a part of a pre-trained world model, which an extraction takes as it is."""
    return key.partition(".")[0] in ("model", "size") and not key.startswith(OPEN_IN_EXTRACTION + OPEN_SIZES)


def apply_mode(config: Config, keys: Sequence[str]) -> None:
    """Fill in what follows from the mode.

    Args:
        config (Config): what was composed.
        keys (sequence of str): those of the command line.

    Raises:
        ConfigurationError: for keys that the mode decides, and for a world model or a task that is not there.
    """
    if config.mode not in MODES:
        return  # validation says so
    if config.mode == "online":
        for key in ("tasks", "task", "world_model", "pretraining", "finetune"):
            if getattr(config, key):
                raise ConfigurationError(
                    f"{key}={getattr(config, key)} belongs to mode=pretrain or mode=extract; choose "
                    "experiment=pretrain or experiment=extract, or one built on them"
                )
        return
    for key in keys:
        if key == "env" or key.startswith("env."):
            raise ConfigurationError(f"{key} has no meaning with mode={config.mode}, which learns from stored episodes")
    if config.mode == "pretrain":
        label = "stored" if config.tasks is None else task_set(config.tasks).name
        config.env = {"name": label, "_target_": "pwm_torchrl.envs.make_task_env", "num_envs": 1}
        return
    for key in keys:
        if of_world_model(key):
            raise ConfigurationError(f"{key} is a part of the pre-trained world_model; leave it out")
    _adopt_world_model(config)
    if config.task is not None:
        config.env = {**task_info(config.task).env_config(), "num_envs": 1}


def _adopt_world_model(config: Config) -> None:
    """Write the architecture of the pre-trained world model into the configuration, where people look for it."""
    if config.world_model is None:
        return  # said later, with what to do
    from pwm_torchrl.modules import world_model_facts

    facts = world_model_facts(config.world_model)
    spec, model, size = facts.spec, config.model, config.size
    config.world_model_sha256 = facts.sha256 or None  # a model that is yet to be trained is pinned when runs begin
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


def apply_steps(config: Config, typed: Mapping[str, Any]) -> None:
    """Turn ``training.steps`` into ``training.epochs``, whole ones, in which at least so many steps are collected.

    Args:
        config (Config): what was composed; ``training.steps`` stays as it was asked for.
        typed (Mapping): the keys of the command line with their values.

    Raises:
        ConfigurationError: if both are typed, or nothing is collected.
    """
    training, key = config.training, "training.epochs"
    if typed.get(key) is not None:
        if typed.get("training.steps") is not None:
            raise ConfigurationError(
                f"training.steps={training.steps} and {key}={training.epochs} both say how long the run is; give one"
            )
        training.steps = None  # of a preset
    if training.steps is None:
        return
    if config.mode != "online":
        updates = "model_updates" if config.mode == "pretrain" else "actor_updates"
        raise ConfigurationError(
            f"training.steps={training.steps} counts environment steps, and mode={config.mode} learns from stored "
            f"episodes without any; set {key}: an epoch there is algorithm.{updates}="
            f"{getattr(config.algorithm, updates)} updates"
        )
    training.epochs = math.ceil(training.steps / (steps_per_epoch(config) * action_repeat(config)))


def steps_per_epoch(config: Config) -> int:
    """Agent steps that an epoch collects, all environments together."""
    algorithm = config.algorithm
    return int(config.env["num_envs"]) * (algorithm.collect_steps or algorithm.horizon)


def action_repeat(config: Config) -> int:
    """Environment steps per agent step; a maker of the user's own is asked by making an environment.

    Raises:
        ConfigurationError: if that cannot be made.
    """
    written = config.env.get("action_repeat")
    if written is not None and str(config.env["_target_"]).startswith("pwm_torchrl.envs."):
        return int(written)
    from pwm_torchrl.envs.facts import environment_facts

    return environment_facts(config.env).action_repeat


def epoch_in_words(config: Config) -> str:
    """What an epoch of a run is."""
    algorithm = config.algorithm
    if config.mode == "pretrain":
        return f"an epoch is {algorithm.model_updates} updates of the world model on stored slices"
    if config.mode == "extract":
        return f"an epoch is {algorithm.actor_updates} actor updates from stored states"
    steps, envs = algorithm.collect_steps or algorithm.horizon, config.env["num_envs"]
    return (
        f"an epoch collects {steps} agent steps in each of {envs} environments ({steps_per_epoch(config)}), then "
        "updates model, policy and critics"
    )


def length_in_words(config: Config) -> str:
    """How long a run is, in epochs and, where it collects any, in environment steps."""
    epochs = config.training.epochs
    if config.mode != "online":
        return f"{epochs:,} epochs; {epoch_in_words(config)}"
    repeat = action_repeat(config)
    total = epochs * steps_per_epoch(config) * repeat
    asked = "" if config.training.steps is None else f" (training.steps={config.training.steps:,})"
    each = "" if repeat == 1 else f", {repeat} environment steps each"
    return f"{epochs:,} epochs = {total:,} environment steps{asked}; {epoch_in_words(config)}{each}"


def check_stored(config: Config, without_data: bool = False) -> None:
    """Check stored episodes, world model, tasks and simulator of a run against each other, before anything starts.

    Args:
        config (Config): the run.
        without_data (bool): as for :func:`~pwm_torchrl.run.stored_episodes.run_facts`. Defaults to ``False``.

    Raises:
        ConfigurationError: for whatever disagrees.
    """
    if config.mode == "online":
        return
    if config.mode == "extract" and config.task is not None and config.training.eval_episodes:
        _require_simulator(task_info(config.task))
    from pwm_torchrl.run.stored_episodes import run_facts

    run_facts(config, without_data)


def _require_simulator(task: TaskInfo) -> None:
    library = task.extra.replace("-", "_")
    if library and importlib.util.find_spec(library) is None:
        raise MissingLibraryError(
            f"task={task.name} is evaluated in {library}, which is not installed: pip install "
            f"'pwm-torchrl[{task.extra}]', or extract without evaluating, training.eval_episodes=0"
        )


def tasks_to_extract(config: Config) -> list[str]:
    """The tasks that ``task=all`` means: those of the world model, or those of them that ``tasks`` names.

    Raises:
        ConfigurationError: without a world model, or with tasks that it does not have.
    """
    if config.mode != "extract" or config.world_model is None:
        raise ConfigurationError(
            "task=all extracts a policy for every task of a pre-trained world model; set world_model=DIRECTORY, that "
            "of a pre-training run (experiment=mt30_pretrain) or of an imported checkpoint, and experiment=extract, "
            "mt30 or mt80"
        )
    from pwm_torchrl.modules import world_model_facts

    known = world_model_facts(config.world_model).task_names
    names = known if config.tasks is None else task_set(config.tasks).names
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigurationError(
            f"world_model={config.world_model} was not trained on {', '.join(missing)}; it has {', '.join(known)}"
        )
    return list(names)
