"""Settings that follow from a run's mode, as far as they need no files or torch.

The others are in :mod:`~pwm_torchrl.cli.finalize`.
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
    "derive_epochs",
    "describe_epoch",
    "is_world_model_key",
    "known_action_repeat",
    "set_epochs",
    "steps_per_epoch",
]


#: Keys of ``model`` and ``size`` that are not part of a pre-trained world model.
FREE_KEYS_IN_EXTRACTION = ("model.reward_space", "model.loss.", "model.dynamics.checkpoint_substeps", "model.name")
FREE_SIZES_IN_EXTRACTION = ("size.actor_units", "size.critic_units", "size.num_critics", "size.name")


def is_world_model_key(key: str) -> bool:
    """Whether a key is part of a pre-trained world model, which an extraction cannot change."""
    return key.partition(".")[0] in ("model", "size") and not key.startswith(
        FREE_KEYS_IN_EXTRACTION + FREE_SIZES_IN_EXTRACTION
    )


def apply_mode(config: Config, keys: Sequence[str]) -> None:
    """Set the values that follow from the mode.

    Args:
        config (Config): the composed configuration, changed in place.
        keys (sequence of str): the keys of the command line.

    Raises:
        ConfigurationError: for keys that are not allowed in this mode, and for an unknown task.
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
            raise ConfigurationError(f"{key} has no effect with mode={config.mode}, which learns from stored episodes")
    if config.mode == "pretrain":
        label = "stored" if config.tasks is None else task_set(config.tasks).name
        config.env = {"name": label, "_target_": "pwm_torchrl.envs.make_task_env", "num_envs": 1}
        return
    for key in keys:
        if is_world_model_key(key):
            raise ConfigurationError(f"{key} is fixed by the pre-trained world_model; leave it out")
    if config.task is not None:
        config.env = {**task_info(config.task).env_config(), "num_envs": 1}


def derive_epochs(config: Config, typed: Mapping[str, Any]) -> None:
    """Convert ``training.steps`` to ``training.epochs``, unless the environment must be created for that.

    Args:
        config (Config): the composed configuration; ``training.epochs`` is changed in place.
        typed (Mapping): the keys of the command line with their values.

    Raises:
        ConfigurationError: if the command line sets both, or the run collects nothing.
    """
    training, key = config.training, "training.epochs"
    if typed.get(key) is not None:
        if typed.get("training.steps") is not None:
            raise ConfigurationError(
                f"training.steps={training.steps} and {key}={training.epochs} both set the length of the run; give one"
            )
        training.steps = None  # of a preset
    if training.steps is None:
        return
    if config.mode != "online":
        updates = "model_updates" if config.mode == "pretrain" else "actor_updates"
        raise ConfigurationError(
            f"training.steps={training.steps} counts environment steps, but mode={config.mode} learns from stored "
            f"episodes; set {key}: an epoch is algorithm.{updates}="
            f"{getattr(config.algorithm, updates)} updates"
        )
    repeat = known_action_repeat(config)
    if repeat is not None:
        set_epochs(config, repeat)


def set_epochs(config: Config, repeat: int) -> None:
    """Set the smallest number of epochs that collects at least ``training.steps`` environment steps.

    Args:
        config (Config): configuration of an online run with ``training.steps``.
        repeat (int): environment steps per agent step.
    """
    assert config.training.steps is not None
    config.training.epochs = math.ceil(config.training.steps / (steps_per_epoch(config) * repeat))


def known_action_repeat(config: Config) -> int | None:
    """Environment steps per agent step if the configuration contains them; ``None`` for a user's own environment."""
    written = config.env.get("action_repeat")
    ours = str(config.env["_target_"]).startswith("pwm_torchrl.envs.")
    return int(written) if ours and written is not None else None


def steps_per_epoch(config: Config) -> int:
    """Agent steps that an epoch collects, summed over environments."""
    algorithm = config.algorithm
    return int(config.env["num_envs"]) * algorithm.steps_per_env


def describe_epoch(config: Config) -> str:
    """Description of an epoch of a run."""
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
