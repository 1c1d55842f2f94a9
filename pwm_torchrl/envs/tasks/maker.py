"""Maker for every task of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl.envs import EnvBase

from pwm_torchrl.envs.factory import make_env
from pwm_torchrl.envs.info import env_info
from pwm_torchrl.envs.tasks.info import TaskInfo, task_info
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["make_task_env"]


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
    cfg = {
        **info.arguments,
        "_target_": info.maker,
        "name": info.name,
        "episode_length": episode_length or info.episode_length,
        "action_repeat": info.action_repeat,
        "terminates": info.terminates,
    }
    env = make_env(cfg, num_envs=num_envs, seed=seed, device=device, render=render)
    try:
        _check_dimensions(env, info)
    except ConfigurationError:
        env.close()
        raise
    return env


def _check_dimensions(env: EnvBase, info: TaskInfo) -> None:
    made = env_info(env)
    for what in ("observation_dim", "action_dim"):
        found, known = getattr(made, what), getattr(info, what)
        if found != known:
            raise ConfigurationError(
                f"task {info.name!r} has {what}={known} in the task registry, and its environment has {found}"
            )
