"""What the mode of a run decides of its configuration, as far as the words tell it; the rest needs files and torch and
is in :mod:`~pwm_torchrl.cli.complete`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pwm_torchrl.config import Config
from pwm_torchrl.envs.tasks import task_info, task_set
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "apply_mode",
    "apply_steps",
    "epoch_in_words",
    "known_action_repeat",
    "of_world_model",
    "set_epochs",
    "steps_per_epoch",
]


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
        ConfigurationError: for keys that the mode decides, and for a task that is not there.
    """
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
    if config.task is not None:
        config.env = {**task_info(config.task).env_config(), "num_envs": 1}


def apply_steps(config: Config, typed: Mapping[str, Any]) -> None:
    """Turn ``training.steps`` into ``training.epochs``, unless that takes making the environment.

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
    repeat = known_action_repeat(config)
    if repeat is not None:
        set_epochs(config, repeat)


def set_epochs(config: Config, repeat: int) -> None:
    """Set whole epochs in which at least ``training.steps`` environment steps are collected.

    Args:
        config (Config): of an online run with ``training.steps``.
        repeat (int): environment steps per agent step.
    """
    assert config.training.steps is not None
    config.training.epochs = math.ceil(config.training.steps / (steps_per_epoch(config) * repeat))


def known_action_repeat(config: Config) -> int | None:
    """Environment steps per agent step where the configuration tells them; ``None`` for a maker of the user's own."""
    written = config.env.get("action_repeat")
    ours = str(config.env["_target_"]).startswith("pwm_torchrl.envs.")
    return int(written) if ours and written is not None else None


def steps_per_epoch(config: Config) -> int:
    """Agent steps that an epoch collects, all environments together."""
    algorithm = config.algorithm
    return int(config.env["num_envs"]) * algorithm.steps_per_env


def epoch_in_words(config: Config) -> str:
    """What an epoch of a run is."""
    algorithm = config.algorithm
    if config.mode == "pretrain":
        return f"an epoch is {algorithm.model_updates} updates of the world model on stored slices"
    if config.mode == "extract":
        return f"an epoch is {algorithm.actor_updates} actor updates from stored states"
    steps, envs = algorithm.steps_per_env, config.env["num_envs"]
    return (
        f"an epoch collects {steps} agent steps in each of {envs} environments ({steps_per_epoch(config)}), then "
        f"makes the updates of algorithm={algorithm.name}"
    )
