"""Maker for the tasks of the DeepMind Control suite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from torchrl.envs import EnvBase

from pwm_torchrl.envs.arguments import check_maker_arguments
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["batch_dm_control", "check_dm_control_task", "make_dm_control_env"]


def make_dm_control_env(
    domain: str,
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of one dm_control task as one TorchRL environment of batch size ``[N]``.

    Args:
        domain (str): domain of the suite, for example ``"cartpole"``.
        task (str): task of the domain, for example ``"swingup"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): where the tensors go. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``2``.
        episode_length (int, optional): agent steps per episode; ``None`` keeps the task's own limit (for most tasks
            1000 environment steps). Defaults to ``None``.
        render (bool): accepted like by the other makers; rendering needs no preparation here. Defaults to ``False``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, the entries of the task's observation concatenated in its order,
        ``action`` float32 ``[N, A]`` in [-1, 1], and under ``next`` ``reward`` float32 ``[N, 1]`` and bool ``[N, 1]``
        ``done``, ``terminated``, ``truncated``.

    Raises:
        ConfigurationError: for an unknown domain or task.
        MissingLibraryError: if dm_control is not installed.
        EnvironmentFault: later, where a sub-environment raises or returns values that are not finite.

    Examples:
        >>> env = make_dm_control_env("cartpole", "swingup", num_envs=2)
        >>> env.rollout(3)["observation"].shape
        torch.Size([2, 3, 5])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    suite = import_mujoco_library("dm_control.suite", "dm-control", f"env.domain={domain}")
    check_dm_control_task(domain, task, suite.TASKS_BY_DOMAIN, "dm_control's suite")

    def load(**task_kwargs: Any) -> Any:
        return suite.load(domain, task, task_kwargs=task_kwargs)

    return batch_dm_control(f"{domain}-{task}", load, num_envs, seed, device, action_repeat, episode_length)


def batch_dm_control(
    name: str,
    load: Callable[..., Any],
    num_envs: int,
    seed: int,
    device: torch.device | str,
    action_repeat: int,
    episode_length: int | None,
) -> EnvBase:
    """N dm_control environments from wherever as one; arguments and result as :func:`make_dm_control_env`.

    Args:
        name (str): label for messages.
        load (callable): makes a ``dm_control.rl.control.Environment``; called with ``random``, a seed, and, where a
            limit in agent steps replaces the task's own in simulated seconds, ``time_limit``.
        num_envs (int): ``N``.
        seed (int): of sub-environment 0.
        device (torch.device or str): where the tensors go.
        action_repeat (int): environment steps per agent step.
        episode_length (int, optional): agent steps per episode.
    """
    try:
        from pwm_torchrl.envs.dm_sub_env import DMControlSubEnv
        from pwm_torchrl.envs.vector import batch_sub_envs
    except ModuleNotFoundError as error:
        raise MissingLibraryError(f"{error.name} is not installed: pip install 'pwm-torchrl[dm-control]'") from error

    # A few tasks draw their model when loaded, so the seed is needed here already.
    limit: dict[str, Any] = {} if episode_length is None else {"time_limit": float("inf")}
    sub_envs = [
        DMControlSubEnv(name, load(**limit, random=seed + i), action_repeat, episode_length, i) for i in range(num_envs)
    ]
    first = sub_envs[0]
    return batch_sub_envs(
        sub_envs,
        seed=seed,
        device=device,
        episode_length=episode_length or first.own_episode_length(),
        terminates=first.terminates(),
        state_support="exact: MuJoCo physics with warm start, clock, task variables, random generator",
        can_save=True,
    )


def check_dm_control_task(domain: str, task: str, tasks_of: Mapping[str, Collection[str]], where: str) -> None:
    """Raise ConfigurationError unless ``tasks_of`` has the domain and the task."""
    if domain not in tasks_of:
        near = nearest(str(domain), tasks_of)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(sorted(tasks_of))}"
        raise ConfigurationError(f"env.domain={domain!r} is not in {where}: {hint}")
    if task not in tasks_of[domain]:
        raise ConfigurationError(
            f"env.task={task!r} is not a task of {domain}: choose {' or '.join(sorted(tasks_of[domain]))}"
        )
