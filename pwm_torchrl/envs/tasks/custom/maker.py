"""Maker for the custom tasks of the DeepMind Control suite."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torchrl.envs import EnvBase

from pwm_torchrl.envs.arguments import check_maker_arguments
from pwm_torchrl.envs.dm_control_env import batch_dm_control, check_dm_control_task
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.envs.tasks.custom import CUSTOM_TASKS, MODULES

if TYPE_CHECKING:
    import torch

__all__ = ["make_custom_dm_control_env"]


def make_custom_dm_control_env(
    domain: str,
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of one of the tasks that MT30 adds to dm_control's domains.

    Args:
        domain (str): domain of the suite, for example ``"walker"``.
        task (str): custom task of the domain, for example ``"walk_backwards"``.
        num_envs (int): as for :func:`~pwm_torchrl.envs.make_dm_control_env`, also the others. Defaults to ``1``.
        seed (int): Defaults to ``0``.
        device (torch.device or str): Defaults to ``"cpu"``.
        action_repeat (int): Defaults to ``2``.
        episode_length (int, optional): Defaults to ``None``: 1000 environment steps.
        render (bool): Defaults to ``False``.

    Returns:
        EnvBase: as :func:`~pwm_torchrl.envs.make_dm_control_env`.

    Raises:
        ConfigurationError: for an unknown domain or task.
        MissingLibraryError: if dm_control is not installed.

    Examples:
        >>> make_custom_dm_control_env("cheetah", "jump").rollout(3)["observation"].shape
        torch.Size([1, 3, 17])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    check_dm_control_task(domain, task, CUSTOM_TASKS, "the custom tasks")
    import_mujoco_library("dm_control.suite", "dm-control", f"env.domain={domain}")
    load = getattr(importlib.import_module(MODULES[domain]), task)
    return batch_dm_control(f"{domain}-{task}", load, num_envs, seed, device, action_repeat, episode_length)
