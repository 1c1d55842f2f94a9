"""Maker for Meta-World's tasks as MT80 has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl.envs import EnvBase

from pwm_torchrl.envs.arguments import check_maker_arguments
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["EPISODE_STEPS", "make_metaworld_env"]

#: Agent steps per episode; Meta-World itself would go on for 500 environment steps.
EPISODE_STEPS = 100
_VERSION = "-v3"


def make_metaworld_env(
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of one Meta-World task as one TorchRL environment of batch size ``[N]``.

    The goal is part of the observation, every episode draws objects and goal anew, and one zero action is taken after
    each reset. Observations are passed on as they are, also where they leave the box that Meta-World declares.

    Args:
        task (str): for example ``"reach"``, Meta-World's ``reach-v3``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): where the tensors go. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``2``.
        episode_length (int, optional): agent steps per episode. Defaults to ``None``: 100.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, 39]``, ``action`` float32 ``[N, 4]`` in [-1, 1], and under ``next``
        ``reward`` float32 ``[N, 1]``, bool ``[N, 1]`` ``done``, ``terminated``, ``truncated`` and ``success``, whether
        the task is solved at this step.

    Raises:
        ConfigurationError: for an unknown task.
        MissingLibraryError: if Meta-World is not installed.
        EnvironmentFault: later, where a sub-environment raises or returns values that are not finite.

    Examples:
        >>> make_metaworld_env("reach", num_envs=2).rollout(3)["next", "success"].shape  # doctest: +SKIP
        torch.Size([2, 3, 1])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    classes = import_mujoco_library("metaworld", "metaworld", f"env.task={task}").ALL_V3_ENVIRONMENTS
    if f"{task}{_VERSION}" not in classes:
        known = [name.removesuffix(_VERSION) for name in classes]
        near = nearest(str(task), known)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
        raise ConfigurationError(f"env.task={task!r} is not a task of Meta-World: {hint}")
    from pwm_torchrl.envs.tasks.metaworld_sub_env import MetaWorldSubEnv
    from pwm_torchrl.envs.vector import batch_sub_envs

    length = episode_length or EPISODE_STEPS
    make = classes[f"{task}{_VERSION}"]
    return batch_sub_envs(
        [MetaWorldSubEnv(f"mw-{task}", make, action_repeat, length, i, render) for i in range(num_envs)],
        seed=seed,
        device=device,
        episode_length=length,
        terminates=False,
        state_support="exact: MuJoCo physics with warm start, clock, task variables, goal, random generator",
        can_save=True,
    )
