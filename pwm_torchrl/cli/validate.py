"""Checks of a composed configuration: values that cannot work together, here or on the cluster."""

from __future__ import annotations

import math
import os
import re
import typing
from collections.abc import Callable
from typing import Any

from pwm_torchrl.choices import nearest_sentence, schema_keys
from pwm_torchrl.cluster.slurm import to_minutes
from pwm_torchrl.commands import typed
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError

__all__ = ["CHOICES", "INTEGERS_OF_ENV", "check_cluster", "read_time", "require_runnable", "validate", "value_of"]

GIB = 2**30
_NAMES = ("partition", "account", "qos")


def read_time(cluster: ClusterConfig) -> None:
    """Moves ``cluster.time`` into ``cluster.time_min``.

    Raises:
        ConfigurationError: if it is not a time limit, or ``time_min`` says otherwise.
    """
    if cluster.time is None:
        return
    # YAML reads an unquoted 24:00:00 as the number 86400: plain numbers are refused, for they may be such.
    try:
        minutes = None if cluster.time.isdecimal() else to_minutes(cluster.time)
    except ValueError:
        minutes = None
    if minutes is None:
        raise ConfigurationError(
            f"cluster.time={cluster.time} is not a time limit; write hours:minutes:seconds in quotes, as in "
            '"24:00:00" or "1-12:00:00", or set cluster.time_min in minutes'
        )
    if cluster.time_min not in (None, minutes):
        raise ConfigurationError(
            f'cluster.time="{cluster.time}" and cluster.time_min={cluster.time_min} differ; set one of them'
        )
    cluster.time, cluster.time_min = None, minutes


def check_cluster(cluster: ClusterConfig) -> None:
    """Checks the keys of a profile against each other.

    Raises:
        ConfigurationError: for the first thing found wrong.
    """
    for key in _NAMES:
        value = getattr(cluster, key)
        if value is not None and not re.fullmatch(r"[\w.@+-]+(,[\w.@+-]+)*", value):
            raise ConfigurationError(
                f"cluster.{key}={value!r} is not a name that SLURM could have; set its {key}, or null"
            )
    for key in ("constraint", "gres", "comment"):
        value = getattr(cluster, key)
        if value is not None and (not value.strip() or "\n" in value):
            raise ConfigurationError(f"cluster.{key}={value!r} is not one line of text; set it, or null")
    if cluster.kind == "slurm":
        _check_gpus(cluster)
    if cluster.mem_gib is not None and cluster.host_gib is not None and cluster.mem_gib > cluster.host_gib:
        raise ConfigurationError(
            f"cluster.mem_gib={cluster.mem_gib:g} is more than a job may have on a node, "
            f"cluster.host_gib={cluster.host_gib:g}; use that or less"
        )
    longest = min((t for t in (cluster.time_min, cluster.max_time_min) if t is not None), default=None)
    if longest is not None and cluster.signal_delay_s >= longest * 60:
        raise ConfigurationError(
            f"cluster.signal_delay_s={cluster.signal_delay_s} is not shorter than a job, {longest} min "
            "(cluster.time_min, cluster.max_time_min): it would be told to save as soon as it starts"
        )


def _check_gpus(cluster: ClusterConfig) -> None:
    if cluster.gpu is not None and not cluster.gpus and cluster.gres is None:
        raise ConfigurationError(
            f"cluster.gpus=0 asks for no GPU, but cluster.gpu={cluster.gpu} plans with one; set cluster.gpus=1, or "
            "cluster.gpu=null"
        )
    if cluster.gpus and cluster.gpu is None:
        raise ConfigurationError(
            f"cluster.gpus={cluster.gpus} needs the type of GPU for the memory plan; set cluster.gpu, such as "
            "cluster.gpu=l40s"
        )
    if cluster.gres is not None and not re.search(r"(^|,)gpu[:=]", cluster.gres) and cluster.gpu is not None:
        raise ConfigurationError(
            f"cluster.gres={cluster.gres} asks for no GPU, but cluster.gpu={cluster.gpu} plans with one; write it as "
            "gpu:TYPE:NUMBER, or set cluster.gpu=null"
        )


CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("online", "pretrain", "extract"),
    "data.stage": ("none", "scratch"),
    "model.dynamics.kind": ("mlp", "residual", "flow"),
    "model.dynamics.parameterization": ("residual_endpoint", "tangent", "simnorm_velocity"),
    "model.dynamics.solver": ("euler", "heun"),
    "model.loss.form": ("pwm", "tdmpc2"),
    "model.loss.flow_matching_source": ("teacher", "detached", "attached"),
    "model.reward_head": ("scalar", "two_hot"),
    "model.reward_space": ("raw", "symlog"),
    "algorithm.compile": ("auto", "true", "false"),
    "algorithm.actor_starts": ("replay", "current"),
    "training.precision": ("fp32", "tf32", "bf16"),
    "training.replay_storage": ("auto", "memory", "device", "disk"),
    "logger.kind": ("csv", "tensorboard", "wandb"),
    "logger.mode": ("auto", "online", "offline", "disabled"),
    "cluster.kind": ("auto", "local", "debug", "slurm"),
    "memory.kind": ("auto", "fixed"),
}
"""The strings that a key accepts."""

_AT_LEAST: dict[str, float] = {
    "model.dynamics.substeps": 1,
    "model.dynamics.time_features": 0,
    "model.num_bins": 2,
    "model.loss.rollout_weight": 0,
    "model.loss.flow_matching_weight": 0,
    "model.loss.self_consistency_weight": 0,
    "model.loss.termination_coef": 0,
    "model.loss.dynamics_coef": 0,
    "model.loss.reward_coef": 0,
    "model.loss.rho": 0,
    "algorithm.entropy_weight": 0,
    "size.latent_dim": 1,
    "size.simnorm_dim": 1,
    "size.task_dim": 1,
    "size.num_critics": 1,
    "algorithm.horizon": 1,
    "algorithm.collect_steps": 1,
    "algorithm.random_steps": 0,
    "algorithm.actor_batch": 1,
    "algorithm.actor_updates": 1,
    "algorithm.model_batch": 1,
    "algorithm.model_updates": 0,
    "algorithm.first_model_updates": 0,
    "algorithm.critic_passes": 1,
    "algorithm.critic_minibatches": 1,
    "training.epochs": 1,
    "training.steps": 1,
    "training.eval_every": 0,
    "training.eval_episodes": 0,
    "data.validation_slices": 1,
    "training.checkpoint_every": 0,
    "training.checkpoint_minutes": 0,
    "training.keep_checkpoints": 1,
    "training.replay_capacity": 1,
    "training.gradient_profile_every": 0,
    "training.threads": 1,
    "memory.model_micro_batch": 1,
    "memory.actor_micro_batch": 1,
    "memory.critic_micro_batch": 1,
    "memory.disk_above_gib": 0,
    "cluster.gpus": 0,
    "cluster.nodes": 1,
    "cluster.cpus": 1,
    "cluster.time_min": 1,
    "cluster.max_time_min": 1,
    "cluster.signal_delay_s": 1,
    "cluster.array_parallelism": 1,
    "cluster.max_memory_restarts": 0,
    "env.num_envs": 1,
    "env.action_repeat": 1,
    "env.episode_length": 1,
    "seed": 0,
}

#: Limits that may be infinite, which is none.
_INFINITE = (
    "algorithm.model_grad_norm",
    "algorithm.actor_grad_norm",
    "algorithm.critic_grad_norm",
    "training.checkpoint_minutes",
    "memory.disk_above_gib",
)
_POSITIVE = (
    "model_lr",
    "actor_lr",
    "critic_lr",
    "model_grad_norm",
    "actor_grad_norm",
    "critic_grad_norm",
)
#: Keys of any environment that are whole numbers.
INTEGERS_OF_ENV = ("env.num_envs", "env.action_repeat", "env.episode_length")


def validate(config: Config) -> None:
    """Checks ranges, choices and combinations.

    Raises:
        ConfigurationError: for the first thing found wrong.
    """
    _check_env(config.env)
    _check_finite(config)
    for key, accepted in CHOICES.items():
        value = value_of(config, key)
        if isinstance(value, bool):
            value = str(value).lower()
        if key == "model.dynamics.kind" and "." in value:
            continue  # a class of the user's own, which is looked up when the configuration is completed
        if value not in accepted:
            raise ConfigurationError(
                f"{key}={value} is not accepted{nearest_sentence(str(value), accepted)}; "
                f"choose one of {', '.join(accepted)}"
            )
    for key, least in _AT_LEAST.items():
        value = value_of(config, key)
        if value is not None and not value >= least:
            raise ConfigurationError(f"{key}={value} is too small; it must be at least {least:g}")
    for key in _POSITIVE:
        _require(config, f"algorithm.{key}", lambda v: v > 0, "must be above 0")
    _require(config, "algorithm.final_lr", lambda v: v >= 0, "must not be negative")
    _require(config, "algorithm.gamma", lambda v: 0 < v <= 1, "must lie in (0, 1]")
    _require(config, "algorithm.lmbda", lambda v: 0 <= v <= 1, "must lie in [0, 1]")
    for key in ("memory.host_gib", "memory.device_gib", "cluster.host_gib", "cluster.mem_gib"):
        _require(config, key, lambda v: v is None or v > 0, "must be above 0")
    _require(config, "data.validation_fraction", lambda v: 0 <= v < 1, "must lie in [0, 1)")
    if config.mode != "extract":
        _require(config, "training.eval_episodes", lambda v: v >= 1, "is too small; it must be at least 1")
    if config.mode == "pretrain":
        _require(config, "algorithm.model_updates", lambda v: v >= 1, "is too small; it must be at least 1")
    _require(config, "memory.margin", lambda v: 0 <= v < 1, "must lie in [0, 1)")
    _require(config, "memory.stop_at", lambda v: 0 < v <= 1, "must lie in (0, 1]")
    for key in ("algorithm.model_betas", "algorithm.actor_betas", "algorithm.critic_betas"):
        _require(
            config,
            key,
            lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
            "must be two numbers in [0, 1)",
        )
    for key in ("size.units", "size.encoder_units", "size.actor_units", "size.critic_units"):
        _require(
            config,
            key,
            lambda v: len(v) > 0 and min(v) > 0,
            "must be a list of at least one positive width",
        )
    _require(
        config,
        "device",
        lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None,
        "must be auto, cpu, cuda or cuda:N",
    )
    check_cluster(config.cluster)
    _check_combinations(config)


def _check_finite(config: Config) -> None:
    """Every number of the schema is one; infinite are only limits that may be none."""
    for key, hint in schema_keys().items():
        if float not in (hint, *typing.get_args(hint)):
            continue
        value = value_of(config, key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and math.isnan(number):
                raise ConfigurationError(f"{key}={value} is not a number; give one")
            if number is not None and math.isinf(number) and key not in _INFINITE:
                raise ConfigurationError(f"{key}={value} must be finite")


def require_runnable(config: Config) -> None:
    """Refuses to train in this process what was meant for nodes elsewhere.

    Raises:
        ConfigurationError: for a profile of SLURM nodes outside of an allocation.
    """
    if config.cluster.kind == "slurm" and not os.environ.get("SLURM_JOB_ID"):
        raise ConfigurationError(
            f"cluster={config.cluster.name} describes SLURM nodes, and this process is on none; "
            f"{typed('submit')} queues a job there, cluster=local trains here"
        )


def _check_env(env: dict[str, Any]) -> None:
    target = env.get("_target_")
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise ConfigurationError(
            f"env._target_={target} is not the dotted path of a function; write it as env._target_=my_pkg.make_env"
        )
    if env.get("num_envs") is None:
        raise ConfigurationError("env.num_envs has no value; set the number of environments, env.num_envs=8")
    for key in INTEGERS_OF_ENV:
        value = env.get(key.removeprefix("env."))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigurationError(f"{key}={value}: {str(value)!r} is not an integer")


def _check_combinations(config: Config) -> None:
    size, model, algorithm = config.size, config.model, config.algorithm
    if size.latent_dim % size.simnorm_dim:
        raise ConfigurationError(
            f"size.latent_dim={size.latent_dim} is not a multiple of "
            f"size.simnorm_dim={size.simnorm_dim}; "
            "SimNorm needs groups of equal size"
        )
    if not model.vmin < model.vmax:
        raise ConfigurationError(f"model.vmin={model.vmin} must be below model.vmax={model.vmax}")
    for key in ("flow_matching_weight", "self_consistency_weight"):
        if getattr(model.loss, key) and model.dynamics.kind != "flow":
            raise ConfigurationError(
                f"model.loss.{key}={getattr(model.loss, key)} needs model.dynamics.kind=flow, not {model.dynamics.kind}"
            )
    if model.loss.self_consistency_weight and not model.dynamics.condition_on_step_size:
        raise ConfigurationError(
            f"model.loss.self_consistency_weight={model.loss.self_consistency_weight} needs "
            "model.dynamics.condition_on_step_size=true"
        )
    episode = config.env.get("episode_length")
    if episode is not None and algorithm.horizon > episode:
        raise ConfigurationError(
            f"algorithm.horizon={algorithm.horizon} is longer than an episode, "
            f"env.episode_length={episode} agent "
            f"steps; use algorithm.horizon={episode} or less"
        )
    if training_slices_overflow(config):
        raise ConfigurationError(
            f"training.replay_capacity={config.training.replay_capacity} holds less than one "
            "horizon of every "
            f"environment; with env.num_envs={config.env['num_envs']} and "
            f"algorithm.horizon={algorithm.horizon} it "
            f"needs at least {config.env['num_envs'] * (algorithm.horizon + 1)}"
        )
    micro = config.memory.model_micro_batch
    if micro is not None and micro > algorithm.model_batch:
        raise ConfigurationError(
            f"memory.model_micro_batch={micro} is larger than "
            f"algorithm.model_batch={algorithm.model_batch}; "
            "use null for all at once"
        )


def training_slices_overflow(config: Config) -> bool:
    """Whether the replay buffer is too small to hold a single slice of each environment."""
    return config.mode == "online" and config.training.replay_capacity < config.env["num_envs"] * (
        config.algorithm.horizon + 1
    )


def _require(config: Config, key: str, accepts: Callable[[Any], bool], rule: str) -> None:
    value = value_of(config, key)
    if not accepts(value):
        raise ConfigurationError(f"{key}={value} {rule}")


def value_of(config: Config, key: str) -> Any:
    """What a dotted key holds; ``None`` for one that the environment does not have."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    return value
