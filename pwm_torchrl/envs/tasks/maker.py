"""Makers of the registry's tasks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchrl.envs import EnvBase

from pwm_torchrl.envs.factory import as_stated, make_env, probe_env
from pwm_torchrl.envs.makers import batch_dm_control, check_dm_control_task
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.envs.standard import EnvInfo, check_maker_arguments, env_info
from pwm_torchrl.envs.tasks.registry import TaskInfo, task_info
from pwm_torchrl.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "CUSTOM_TASKS",
    "EPISODE_STEPS",
    "make_custom_dm_control_env",
    "make_metaworld_env",
    "make_task_env",
    "probe_task_env",
]

#: Tasks by domain; each is a function ``DOMAIN_TASK`` of :mod:`pwm_torchrl.envs.tasks.custom`.
CUSTOM_TASKS: dict[str, tuple[str, ...]] = {
    "walker": ("walk_backwards", "run_backwards"),
    "cheetah": ("run_backwards", "run_front", "run_back", "jump"),
    "hopper": ("hop_backwards",),
    "reacher": ("three_easy", "three_hard"),
    "ball_in_cup": ("spin",),
    "pendulum": ("spin",),
}


def make_task_env(
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of a registered task: of MT30, MT80, or added by :func:`~pwm_torchrl.envs.tasks.register_task`.

    Args:
        task (str): its name, for example ``"walker-walk"`` or ``"mw-reach"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        episode_length (int, optional): agent steps per episode. Defaults to ``None``: the registry's.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: see :func:`~pwm_torchrl.envs.standardize`.

    Raises:
        ConfigurationError: if the task is not registered, or its environment has other dimensions than the registry.
        MissingLibraryError: if its simulator is not installed.

    Examples:
        >>> from pwm_torchrl.envs import make_task_env
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
    return as_stated(replace(made, name=str(env_cfg.get("name") or info.name)), env_cfg)


def _config(info: TaskInfo, episode_length: int | None) -> dict[str, Any]:
    """The configuration for :func:`~pwm_torchrl.envs.make_env` to call the task's own maker."""
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
    """N environments of one of the custom tasks that MT30 adds to dm_control's domains.

    Args:
        domain (str): domain of the suite, for example ``"walker"``.
        task (str): custom task of the domain, for example ``"walk_backwards"``.
        num_envs (int): this and all others as for :func:`~pwm_torchrl.envs.make_dm_control_env`. Defaults to ``1``.
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
        >>> from pwm_torchrl.envs.tasks.maker import make_custom_dm_control_env
        >>> make_custom_dm_control_env("cheetah", "jump").rollout(3)["observation"].shape
        torch.Size([1, 3, 17])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    check_dm_control_task(domain, task, CUSTOM_TASKS, "the custom tasks")
    import_mujoco_library("dm_control.suite", "dm-control", f"env.domain={domain}")
    load = getattr(importlib.import_module("pwm_torchrl.envs.tasks.custom"), f"{domain}_{task}")
    return batch_dm_control(f"{domain}-{task}", load, num_envs, seed, device, action_repeat, episode_length)


#: Agent steps per episode; Meta-World's own limit is 500 environment steps.
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

    The goal is part of the observation, objects and goal are randomised in every episode, and one zero action is taken
    after each reset. Observations are passed on unchanged, even outside the bounds that Meta-World declares.

    Args:
        task (str): for example ``"reach"``, Meta-World's ``reach-v3``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
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
        EnvironmentFault: later, if a sub-environment raises or returns values that are not finite.

    Examples:
        >>> from pwm_torchrl.envs.tasks.maker import make_metaworld_env
        >>> make_metaworld_env("reach", num_envs=2).rollout(3)["next", "success"].shape  # doctest: +SKIP
        torch.Size([2, 3, 1])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    classes = import_mujoco_library("metaworld", "metaworld", f"env.task={task}").ALL_V3_ENVIRONMENTS
    if f"{task}{_VERSION}" not in classes:
        known = [name.removesuffix(_VERSION) for name in classes]
        near = nearest(str(task), known)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigurationError(f"env.task={task!r} is not a task of Meta-World: {hint}")
    from pwm_torchrl.envs.batch import batch_sub_envs
    from pwm_torchrl.envs.gym import MetaWorldSubEnv

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
