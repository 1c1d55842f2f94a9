"""What has to be known of an environment before there is one: to plan memory, also where its simulator is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from pwm_torchrl.envs.dflex import INSTALL
from pwm_torchrl.envs.factory import probe_env
from pwm_torchrl.envs.info import EnvInfo
from pwm_torchrl.envs.tasks.info import task_info
from pwm_torchrl.envs.tasks.maker import probe_task_env
from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.own_code import locate

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
        return probe_env(env_cfg, {"env.num_envs": num_envs})
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


def opened_facts(
    env_cfg: Mapping[str, Any], sizes: Mapping[str, int], *, device: torch.device | str = "cpu"
) -> EnvInfo:
    """Facts of an environment that is really made, whatever is known of it, and closed again.

    Args:
        env_cfg (Mapping): as for :func:`~pwm_torchrl.envs.make_env`.
        sizes (Mapping): as for :func:`~pwm_torchrl.envs.factory.probe_env`.

    Keyword Args:
        device (torch.device or str): where it is made. Defaults to ``"cpu"``.

    Raises:
        ConfigurationError: if it cannot be made or used.
    """
    registered = env_cfg.get("_target_") == TASK_MAKER and env_cfg.get("task")
    return (probe_task_env if registered else probe_env)(env_cfg, sizes, device=device)


def require_maker(env_cfg: Mapping[str, Any]) -> None:
    """Look up what makes an environment, without making one: a simulator that needs a GPU may not be made here.

    Raises:
        ConfigurationError: if there is no such maker.
        MissingLibraryError: if its library is not installed.
    """
    target = str(env_cfg.get("_target_"))
    locate("env._target_", target)
    if target.endswith(".make_dflex_env"):
        module = str(env_cfg.get("module") or "dflex.envs")
        if find_spec(module.partition(".")[0]) is None:
            raise MissingLibraryError(
                f"env.name={env_cfg.get('name')} needs {module}, which is not installed; get dflex with: {INSTALL}"
            )
