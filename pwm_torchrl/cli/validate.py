"""Checks a composed configuration for values that cannot work together, on this machine or on the cluster."""

from __future__ import annotations

import re
from typing import Any

from pwm_torchrl.algorithm.declarations import check_least, declarations
from pwm_torchrl.cluster.resources import sbatch_options
from pwm_torchrl.cluster.slurm import to_minutes
from pwm_torchrl.commands import typed
from pwm_torchrl.config import NETWORKS, ClusterConfig, Config, check_few_step_rollout
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.claims import own_job

__all__ = ["INTEGERS_OF_ENV", "check_cluster", "read_time", "require_runnable", "validate", "value_of"]

_NAMES = ("partition", "account", "qos")


def read_time(cluster: ClusterConfig) -> None:
    """Converts ``cluster.time`` to minutes in ``cluster.time_min``.

    Raises:
        ConfigurationError: if it is not a time limit, or differs from ``time_min``.
    """
    if cluster.time is None:
        return
    # YAML reads an unquoted 24:00:00 as the number 86400, so plain numbers are rejected.
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
                f"cluster.{key}={value!r} is not a valid name in SLURM; set the name of a {key}, or null"
            )
    for key in ("constraint", "gres", "comment"):
        value = getattr(cluster, key)
        if value is not None and (not value.strip() or "\n" in value):
            raise ConfigurationError(f"cluster.{key}={value!r} must be one line of text, or null")
    sbatch_options(cluster)
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
            f"cluster.gpus=0 requests no GPU, but cluster.gpu={cluster.gpu} is set; set cluster.gpus=1, or "
            "cluster.gpu=null"
        )
    if cluster.gpus and cluster.gpu is None:
        raise ConfigurationError(
            f"cluster.gpus={cluster.gpus} needs the type of GPU for the memory plan; set cluster.gpu, such as "
            "cluster.gpu=l40s"
        )
    if cluster.gres is not None and not re.search(r"(^|,)gpu[:=]", cluster.gres) and cluster.gpu is not None:
        raise ConfigurationError(
            f"cluster.gres={cluster.gres} requests no GPU, but cluster.gpu={cluster.gpu} is set; write it as "
            "gpu:TYPE:NUMBER, or set cluster.gpu=null"
        )


#: Integer keys of every environment.
INTEGERS_OF_ENV = ("env.num_envs", "env.action_repeat", "env.episode_length")


def validate(config: Config) -> None:
    """Checks ranges, choices and combinations.

    Raises:
        ConfigurationError: for the first thing found wrong.
    """
    _check_env(config.env)
    config.check()
    parts = config.init_from_parts
    if not parts or len(parts) != len(set(parts)):
        raise ConfigurationError(f"init_from_parts={parts} must name some of {', '.join(NETWORKS)}, each once")
    if config.mode != "extract":
        _require_one(config, "training.eval_episodes")
    if config.mode == "pretrain":
        _require_one(config, "algorithm.model_updates")
    check_cluster(config.cluster)
    _check_combinations(config)


def require_runnable(config: Config) -> None:
    """Rejects a profile of SLURM nodes for a run in this process, unless it is inside an allocation.

    Raises:
        ConfigurationError: for a profile of SLURM nodes outside of an allocation.
    """
    if config.cluster.kind == "slurm" and own_job() is None:
        raise ConfigurationError(
            f"cluster={config.cluster.name} describes SLURM nodes, but this process is not on one; "
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
        if value is not None and value < 1:
            raise ConfigurationError(f"{key}={value} is too small; it must be at least 1")


def _check_combinations(config: Config) -> None:
    model, algorithm = config.model, config.algorithm
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
    check_few_step_rollout(
        model.loss.few_step_rollout, bool(model.dynamics.imagination_substeps), model.loss.flow_matching_weight
    )
    check_least(algorithm, declarations(algorithm.name).least)
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
            f"slice of every environment; with env.num_envs={config.env['num_envs']} and "
            f"{algorithm.slice_key}={algorithm.slice_length} it "
            f"needs at least {config.env['num_envs'] * (algorithm.slice_length + 1)}"
        )
    micro = config.memory.model_micro_batch
    if micro is not None and micro > algorithm.model_batch:
        raise ConfigurationError(
            f"memory.model_micro_batch={micro} is larger than "
            f"algorithm.model_batch={algorithm.model_batch}; "
            "use null for all at once"
        )


def training_slices_overflow(config: Config) -> bool:
    """Whether the run has a replay buffer, and it is too small to hold a single slice of each environment."""
    if config.mode != "online" or declarations(config.algorithm.name).simulates:
        return False
    return config.training.replay_capacity < config.env["num_envs"] * (config.algorithm.slice_length + 1)


def _require_one(config: Config, key: str) -> None:
    value = value_of(config, key)
    if value < 1:
        raise ConfigurationError(f"{key}={value} is too small with mode={config.mode}; it must be at least 1")


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; ``None`` for a key that the environment does not have."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    return value
