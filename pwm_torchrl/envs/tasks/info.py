"""What a task is, and the tasks that are known by name. Light: no simulator, no torch."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pwm_torchrl.errors import ConfigurationError, nearest
from pwm_torchrl.own_code import make_cwd_importable

__all__ = ["MODULES_VARIABLE", "TaskInfo", "known_tasks", "register_task", "task_info"]

#: Names modules, with commas, that register tasks of a user's own: so that commands and jobs know them, too.
MODULES_VARIABLE = "PWM_TORCHRL_TASKS"
SCORES = ("return", "success")


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
        action_repeat (int): environment steps per agent step, rewards summed; more than 1 needs a maker with an
            argument of this name. Defaults to ``1``.
        score (str): ``"return"``, or ``"success"``: the share of episodes that end with their success flag set.
            Defaults to ``"return"``.
        score_range (tuple of float): the value that counts 0 and the one that counts 1 when scores of several tasks
            are averaged. Defaults to ``(0.0, 1000.0)``.
        extra (str): the package's extra that installs its simulator, the library's name with hyphens; empty if it needs
            none. Defaults to ``""``.
        terminates (bool): whether an episode can end otherwise than by its length. Defaults to ``False``.
    """

    name: str
    observation_dim: int
    action_dim: int
    episode_length: int
    maker: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    action_repeat: int = 1
    score: str = "return"
    score_range: tuple[float, float] = (0.0, 1000.0)
    extra: str = ""
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

    Do so in a module that the environment variable ``PWM_TORCHRL_TASKS`` names, and the commands know the task.

    Raises:
        ConfigurationError: if the name is taken by another task, or a value cannot be right.

    Examples:
        >>> register_task(TaskInfo("my-task", 4, 2, 100, "my_package.make_my_task"))  # doctest: +SKIP
    """
    if not isinstance(info.name, str) or not re.fullmatch(r"\w[\w.+-]*", info.name):
        raise ConfigurationError(
            f"a task cannot be called {info.name!r}: only letters, digits and _ . + - can be in name=..."
        )
    known = _TASKS.get(info.name)
    if known is not None and known != info:
        raise ConfigurationError(f"a task called {info.name!r} is registered already; give the new one another name")
    for name in ("observation_dim", "action_dim", "episode_length", "action_repeat"):
        value = getattr(info, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"task {info.name!r}: {name}={value!r} must be an integer of at least 1")
    if info.score not in SCORES:
        raise ConfigurationError(f"task {info.name!r}: score={info.score!r} must be {' or '.join(SCORES)}")
    if not info.score_range[0] < info.score_range[1]:
        raise ConfigurationError(f"task {info.name!r}: score_range={info.score_range} must be increasing")
    _TASKS[info.name] = info
    return info


def known_tasks() -> dict[str, TaskInfo]:
    """All registered tasks by name, in the order of their registration."""
    return dict(_TASKS)


def task_info(name: str) -> TaskInfo:
    """Facts of one task.

    Raises:
        ConfigurationError: if it is not registered, also not by the modules that ``PWM_TORCHRL_TASKS`` names; the
            nearest names are given.
    """
    if name not in _TASKS:
        _import_own_tasks()
    if name not in _TASKS:
        near = nearest(str(name), _TASKS)
        own = f"a task of your own, which a module that {MODULES_VARIABLE} names has to register"
        hint = f"did you mean {near}, or {own}?" if near else f"is it {own}?"
        raise ConfigurationError(f"task {name!r} is not known: {hint}")
    return _TASKS[name]


def _import_own_tasks() -> None:
    """Import the modules of :data:`MODULES_VARIABLE`; the working directory counts as importable."""
    modules = [name.strip() for name in os.environ.get(MODULES_VARIABLE, "").split(",") if name.strip()]
    if modules:
        make_cwd_importable()
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"{MODULES_VARIABLE}={module} cannot be imported: there is no module {error.name!r}"
            ) from error
