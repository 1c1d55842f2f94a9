"""Maker for every task of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchrl.envs import EnvBase

from pwm_torchrl.envs.factory import make_env, probe_env
from pwm_torchrl.envs.info import EnvInfo, env_info
from pwm_torchrl.envs.tasks.info import TaskInfo, task_info
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["make_task_env", "probe_task_env"]


def make_task_env(
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of a registered task, of MT30, MT80 or :func:`~pwm_torchrl.envs.tasks.register_task`.

    Args:
        task (str): its name, for example ``"walker-walk"`` or ``"mw-reach"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): where the tensors go. Defaults to ``"cpu"``.
        episode_length (int, optional): agent steps per episode. Defaults to ``None``: the registry's.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: see :func:`~pwm_torchrl.envs.standardize`.

    Raises:
        ConfigurationError: if the task is not registered, or its environment has other dimensions than the registry.
        MissingLibraryError: if its simulator is not installed.

    Examples:
        >>> make_task_env("pendulum-swingup", num_envs=2).rollout(3)["observation"].shape
        torch.Size([2, 3, 3])
    """
    info = task_info(task)
    cfg = _config(info, episode_length)
    env = make_env(cfg, num_envs=num_envs, seed=seed, device=device, render=render)
    try:
        _check_dimensions(env_info(env), info)
    except ConfigurationError:
        env.close()
        raise
    return env


def probe_task_env(
    env_cfg: Mapping[str, Any], sizes: Mapping[str, int], *, device: torch.device | str = "cpu"
) -> EnvInfo:
    """:func:`~pwm_torchrl.envs.factory.probe_env` of a configuration whose maker is :func:`make_task_env`."""
    info = task_info(str(env_cfg["task"]))
    made = probe_env(_config(info, env_cfg.get("episode_length")), sizes, device=device)
    _check_dimensions(made, info)
    return replace(made, name=str(env_cfg.get("name") or info.name))


def _config(info: TaskInfo, episode_length: int | None) -> dict[str, Any]:
    """What :func:`~pwm_torchrl.envs.make_env` needs to make a task's environment with its own maker."""
    return {
        **info.arguments,
        "_target_": info.maker,
        "name": info.name,
        "episode_length": episode_length or info.episode_length,
        "action_repeat": info.action_repeat,
        "terminates": info.terminates,
    }


def _check_dimensions(made: EnvInfo, info: TaskInfo) -> None:
    for what in ("observation_dim", "action_dim"):
        found, known = getattr(made, what), getattr(info, what)
        if found != known:
            raise ConfigurationError(
                f"task {info.name!r} has {what}={known} in the task registry, and its environment has {found}"
            )
