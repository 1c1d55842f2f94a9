"""What a task is, and the tasks that are known by name. Light: no simulator, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pwm_torchrl.errors import ConfigurationError, nearest

__all__ = ["TaskInfo", "known_tasks", "register_task", "task_info"]


@dataclass(frozen=True)
class TaskInfo:
    """Facts of a task, without making its environment.

    Attributes:
        name (str): ``"walker-walk"``, ``"mw-reach"``.
        observation_dim (int): O of the task itself, before padding.
        action_dim (int): A of the task itself.
        episode_length (int): agent steps.
        maker (str): dotted path of a function that makes its environment, called with ``arguments`` and what
            :func:`~pwm_torchrl.envs.make_env` offers.
        arguments (Mapping): keyword arguments of ``maker``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``2``.
        score (str): ``"return"``, or ``"success"``: the share of episodes that end with their success flag set.
            Defaults to ``"return"``.
        score_range (tuple of float): the value that counts 0 and the one that counts 1 when scores of several tasks
            are averaged. Defaults to ``(0.0, 1000.0)``.
        extra (str): the package's extra that installs its simulator, named like the library; empty if it needs none.
            Defaults to ``"dm_control"``.
        terminates (bool): whether an episode can end otherwise than by its length. Defaults to ``False``.
    """

    name: str
    observation_dim: int
    action_dim: int
    episode_length: int
    maker: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    action_repeat: int = 2
    score: str = "return"
    score_range: tuple[float, float] = (0.0, 1000.0)
    extra: str = "dm_control"
    terminates: bool = False

    def normalized(self, value: float) -> float:
        """A return, or a success rate, on the scale of :attr:`score_range`; not clipped."""
        low, high = self.score_range
        return (value - low) / (high - low)

    def env_config(self) -> dict[str, Any]:
        """The ``env`` section of a configuration that makes this task's environment."""
        return {"_target_": "pwm_torchrl.envs.make_task_env", "name": self.name, "task": self.name}


_TASKS: dict[str, TaskInfo] = {}


def register_task(info: TaskInfo) -> TaskInfo:
    """Make a task known by its name, for task sets, data and :func:`~pwm_torchrl.envs.make_task_env`.

    Raises:
        ConfigurationError: if the name is taken by another task, or a number cannot be right.

    Examples:
        >>> register_task(TaskInfo("my-task", 4, 2, 100, "my_package.make_my_task"))  # doctest: +SKIP
    """
    known = _TASKS.get(info.name)
    if known is not None and known != info:
        raise ConfigurationError(f"a task called {info.name!r} is registered already; give the new one another name")
    for name in ("observation_dim", "action_dim", "episode_length", "action_repeat"):
        if getattr(info, name) < 1:
            raise ConfigurationError(f"task {info.name!r}: {name}={getattr(info, name)} must be at least 1")
    if info.score_range[0] >= info.score_range[1]:
        raise ConfigurationError(f"task {info.name!r}: score_range={info.score_range} must be increasing")
    _TASKS[info.name] = info
    return info


def known_tasks() -> dict[str, TaskInfo]:
    """All registered tasks by name, in the order of their registration."""
    return dict(_TASKS)


def task_info(name: str) -> TaskInfo:
    """Facts of one task.

    Raises:
        ConfigurationError: if it is not registered; the nearest names are given.
    """
    if name not in _TASKS:
        near = nearest(str(name), _TASKS)
        hint = f"did you mean {near}?" if near else "register it with pwm_torchrl.envs.register_task"
        raise ConfigurationError(f"task {name!r} is not known: {hint}")
    return _TASKS[name]
