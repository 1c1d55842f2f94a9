"""What has to be known of an environment before there is one: to plan memory, also where its simulator is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pwm_torchrl.envs.factory import make_env
from pwm_torchrl.envs.info import EnvInfo, env_info
from pwm_torchrl.envs.tasks.info import task_info
from pwm_torchrl.errors import MissingLibraryError

#: Observation and action dimensions of dflex's tasks, which a login node need not have installed.
DFLEX_DIMENSIONS = {
    "dflex_hopper": (11, 3),
    "dflex_ant": (37, 8),
    "dflex_anymal": (49, 12),
    "dflex_humanoid": (76, 21),
    "dflex_snu_humanoid": (53, 152),
}

#: Maker of the task registry's environments, which knows their facts.
TASK_MAKER = "pwm_torchrl.envs.make_task_env"


def environment_facts(env_cfg: Mapping[str, Any]) -> EnvInfo:
    """Facts of the environments that a configuration describes.

    One environment is made and closed, which may draw global random numbers; where dflex is not installed, its tasks'
    dimensions are known.

    Args:
        env_cfg (Mapping): as for :func:`~pwm_torchrl.envs.make_env`.

    Raises:
        ConfigurationError: if the environment cannot be made, also because another library is missing.
    """
    num_envs = int(env_cfg.get("num_envs") or 1)
    if env_cfg.get("_target_") == TASK_MAKER and env_cfg.get("task"):
        task = task_info(str(env_cfg["task"]))
        length = int(env_cfg.get("episode_length") or task.episode_length)
        return EnvInfo(
            str(env_cfg.get("name") or task.name),
            task.observation_dim,
            task.action_dim,
            length,
            task.action_repeat,
            num_envs,
            terminates=task.terminates,
        )
    try:
        env = make_env(env_cfg, num_envs=1, seed=0)
    except MissingLibraryError:
        name = str(env_cfg.get("name"))
        known = f"dflex_{name.removeprefix('dflex_')}"
        if known not in DFLEX_DIMENSIONS or not str(env_cfg.get("_target_")).endswith(".make_dflex_env"):
            raise
        observation_dim, action_dim = DFLEX_DIMENSIONS[known]
        length = int(env_cfg.get("episode_length") or 1000)
        terminates = bool(env_cfg.get("early_termination", True))
        return EnvInfo(
            name,
            observation_dim,
            action_dim,
            length,
            1,
            num_envs,
            terminates,
            action_low=(-1.0,) * action_dim,
            action_high=(1.0,) * action_dim,
        )
    try:
        return replace(env_info(env), num_envs=num_envs)
    finally:
        env.close()
