"""What the mode of a run decides of its configuration, and what runs on stored episodes need before they start."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields

from hydra.core.override_parser.types import Override

from pwm_torchrl.config import Config, DynamicsConfig
from pwm_torchrl.envs.tasks import TaskInfo, task_info, task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

__all__ = ["MODES", "apply_mode", "check_stored", "of_world_model", "tasks_to_extract"]

MODES = ("online", "pretrain", "extract")

#: What of ``model`` and ``size`` is no part of a pre-trained world model.
OPEN_IN_EXTRACTION = ("model.reward_space", "model.loss.", "model.dynamics.checkpoint_substeps", "model.name")
OPEN_SIZES = ("size.actor_units", "size.critic_units", "size.num_critics", "size.name")


def of_world_model(key: str) -> bool:
    """Whether a key of the command line is a part of a pre-trained world model, which an extraction takes as it is."""
    return key.partition(".")[0] in ("model", "size") and not key.startswith(OPEN_IN_EXTRACTION + OPEN_SIZES)


def apply_mode(config: Config, parsed: Sequence[Override]) -> None:
    """Fill in what follows from the mode.

    Raises:
        ConfigurationError: for keys that the mode decides, and for a world model or a task that is not there.
    """
    keys = [o.key_or_group for o in parsed]
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


def check_stored(config: Config) -> None:
    """Check stored episodes, world model, tasks and simulator of a run against each other, before anything starts.

    Raises:
        ConfigurationError: for whatever disagrees.
    """
    if config.mode == "online":
        return
    if config.mode == "extract" and config.task is not None and config.training.eval_episodes:
        _require_simulator(task_info(config.task))
    from pwm_torchrl.training.offline import run_facts

    run_facts(config)


def _require_simulator(task: TaskInfo) -> None:
    if task.extra and importlib.util.find_spec(task.extra) is None:
        raise MissingLibraryError(
            f"task={task.name} is evaluated in {task.extra}, which is not installed: pip install "
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
