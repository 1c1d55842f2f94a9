"""Registry of the tasks of MT30 and MT80 and of users' own tasks; needs no simulator and no torch."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pwm_torchrl.errors import ConfigurationError, nearest
from pwm_torchrl.user_code import make_cwd_importable

__all__ = [
    "MODULES_VARIABLE",
    "MT30",
    "MT80",
    "PUBLISHED_SETS",
    "TaskInfo",
    "TaskSet",
    "known_tasks",
    "register_task",
    "task_info",
    "task_set",
]

#: Environment variable with comma-separated modules that register a user's own tasks, for commands and jobs.
MODULES_VARIABLE = "PWM_TORCHRL_TASKS"
SCORES = ("return", "success")


@dataclass(frozen=True)
class TaskInfo:
    """Facts of a task that are known without creating its environment.

    Attributes:
        name (str): ``"walker-walk"``, ``"mw-reach"``.
        observation_dim (int): O of the task itself, before padding.
        action_dim (int): A of the task itself.
        episode_length (int): agent steps.
        maker (str): dotted path of the function that makes its environment; it is called with ``arguments`` and the
            arguments that :func:`~pwm_torchrl.envs.make_env` passes.
        arguments (Mapping): keyword arguments of ``maker``.
        action_repeat (int): environment steps per agent step, with summed rewards; more than 1 requires a maker with an
            argument of this name. Defaults to ``1``.
        score (str): ``"return"``, or ``"success"`` for the fraction of episodes that end with the success flag set.
            Defaults to ``"return"``.
        score_range (tuple of float): values that are mapped to 0 and 1 when scores of several tasks are averaged.
            Defaults to ``(0.0, 1000.0)``.
        extra (str): this package's extra that installs the simulator, named after the library; empty if none is needed.
            Defaults to ``""``.
        terminates (bool): whether episodes can terminate, in addition to their length. Defaults to ``False``.
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
        """A return or success rate, scaled by :attr:`score_range`; not clipped."""
        low, high = self.score_range
        return (value - low) / (high - low)

    def env_config(self) -> dict[str, Any]:
        """The configuration section ``env`` for this task's environment."""
        return {"_target_": "pwm_torchrl.envs.make_task_env", "name": self.name, "task": self.name}


_TASKS: dict[str, TaskInfo] = {}


def register_task(info: TaskInfo) -> TaskInfo:
    """Register a task by its name, for task sets, data and :func:`~pwm_torchrl.envs.make_task_env`.

    To use it in commands, register it in a module that the environment variable ``PWM_TORCHRL_TASKS`` names.

    Raises:
        ConfigurationError: if another task has this name, or a value is invalid.

    Examples:
        >>> from pwm_torchrl.envs import register_task
        >>> from pwm_torchrl.envs.tasks import TaskInfo
        >>> register_task(TaskInfo("my-task", 4, 2, 100, "my_package.make_my_task"))  # doctest: +SKIP
    """
    if not isinstance(info.name, str) or not re.fullmatch(r"\w[\w.+-]*", info.name):
        raise ConfigurationError(
            f"name={info.name!r} is not a valid task name: only letters, digits and _ . + - are allowed"
        )
    known = _TASKS.get(info.name)
    if known is not None and known != info:
        raise ConfigurationError(f"another task named {info.name!r} is already registered; choose another name")
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
    """All registered tasks by name, in order of registration."""
    return dict(_TASKS)


def task_info(name: str) -> TaskInfo:
    """Facts of one task.

    Raises:
        ConfigurationError: if it is not registered, not even by the modules in ``PWM_TORCHRL_TASKS``; the message
            contains the nearest names.
    """
    if name not in _TASKS:
        _import_own_tasks()
    if name not in _TASKS:
        near = nearest(str(name), _TASKS)
        own = f"your own tasks must be registered by a module named in {MODULES_VARIABLE}"
        hint = f"did you mean {near}? Note that {own}" if near else own
        raise ConfigurationError(f"task {name!r} is not known: {hint}.")
    return _TASKS[name]


def _import_own_tasks() -> None:
    """Import the modules of :data:`MODULES_VARIABLE`, also from the working directory."""
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


_STOCK = "pwm_torchrl.envs.make_dm_control_env"
_CUSTOM = "pwm_torchrl.envs.tasks.make_custom_dm_control_env"
_METAWORLD = "pwm_torchrl.envs.tasks.make_metaworld_env"

#: Agent steps per episode: 1000 and 200 environment steps with an action repeat of 2.
_DM_CONTROL_STEPS = 500
_METAWORLD_STEPS = 100
_ACTION_REPEAT = 2

#: (name, domain, task, observation and action dimension, maker)
_DM_CONTROL = (
    ("walker-stand", "walker", "stand", 24, 6, _STOCK),
    ("walker-walk", "walker", "walk", 24, 6, _STOCK),
    ("walker-run", "walker", "run", 24, 6, _STOCK),
    ("cheetah-run", "cheetah", "run", 17, 6, _STOCK),
    ("reacher-easy", "reacher", "easy", 6, 2, _STOCK),
    ("reacher-hard", "reacher", "hard", 6, 2, _STOCK),
    ("acrobot-swingup", "acrobot", "swingup", 6, 1, _STOCK),
    ("pendulum-swingup", "pendulum", "swingup", 3, 1, _STOCK),
    ("cartpole-balance", "cartpole", "balance", 5, 1, _STOCK),
    ("cartpole-balance-sparse", "cartpole", "balance_sparse", 5, 1, _STOCK),
    ("cartpole-swingup", "cartpole", "swingup", 5, 1, _STOCK),
    ("cartpole-swingup-sparse", "cartpole", "swingup_sparse", 5, 1, _STOCK),
    ("cup-catch", "ball_in_cup", "catch", 8, 2, _STOCK),
    ("finger-spin", "finger", "spin", 9, 2, _STOCK),
    ("finger-turn-easy", "finger", "turn_easy", 12, 2, _STOCK),
    ("finger-turn-hard", "finger", "turn_hard", 12, 2, _STOCK),
    ("fish-swim", "fish", "swim", 24, 5, _STOCK),
    ("hopper-stand", "hopper", "stand", 15, 4, _STOCK),
    ("hopper-hop", "hopper", "hop", 15, 4, _STOCK),
    ("walker-walk-backwards", "walker", "walk_backwards", 24, 6, _CUSTOM),
    ("walker-run-backwards", "walker", "run_backwards", 24, 6, _CUSTOM),
    ("cheetah-run-backwards", "cheetah", "run_backwards", 17, 6, _CUSTOM),
    ("cheetah-run-front", "cheetah", "run_front", 17, 6, _CUSTOM),
    ("cheetah-run-back", "cheetah", "run_back", 17, 6, _CUSTOM),
    ("cheetah-jump", "cheetah", "jump", 17, 6, _CUSTOM),
    ("hopper-hop-backwards", "hopper", "hop_backwards", 15, 4, _CUSTOM),
    ("reacher-three-easy", "reacher", "three_easy", 8, 3, _CUSTOM),
    ("reacher-three-hard", "reacher", "three_hard", 8, 3, _CUSTOM),
    ("cup-spin", "ball_in_cup", "spin", 8, 2, _CUSTOM),
    ("pendulum-spin", "pendulum", "spin", 3, 1, _CUSTOM),
)

_METAWORLD_NAMES = (
    "assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button "
    "coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open "
    "faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side "
    "peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull "
    "sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert"
)

for _name, _domain, _task, _observation, _action, _maker in _DM_CONTROL:
    _arguments = MappingProxyType({"domain": _domain, "task": _task})
    register_task(
        TaskInfo(
            _name,
            _observation,
            _action,
            _DM_CONTROL_STEPS,
            _maker,
            _arguments,
            action_repeat=_ACTION_REPEAT,
            extra="dm-control",
        )
    )

for _task in _METAWORLD_NAMES.split():
    register_task(
        TaskInfo(
            f"mw-{_task}",
            39,
            4,
            _METAWORLD_STEPS,
            _METAWORLD,
            MappingProxyType({"task": _task}),
            action_repeat=_ACTION_REPEAT,
            score="success",
            score_range=(0.0, 1.0),
            extra="metaworld",
        )
    )

MT30: tuple[str, ...] = tuple(row[0] for row in _DM_CONTROL)
MT80: tuple[str, ...] = (*MT30, *(f"mw-{_task}" for _task in _METAWORLD_NAMES.split()))


#: Task names of the published sets, in the order of the task indices in data and checkpoints.
PUBLISHED_SETS: dict[str, tuple[str, ...]] = {"mt30": MT30, "mt80": MT80}


@dataclass(frozen=True)
class TaskSet:
    """Tasks in a fixed order; a task's index is its position.

    Attributes:
        name (str): label.
        tasks (tuple of TaskInfo): the tasks.
    """

    name: str
    tasks: tuple[TaskInfo, ...]

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def observation_dims(self) -> tuple[int, ...]:
        """O of every task."""
        return tuple(task.observation_dim for task in self.tasks)

    @property
    def action_dims(self) -> tuple[int, ...]:
        """A of every task."""
        return tuple(task.action_dim for task in self.tasks)

    @property
    def observation_dim(self) -> int:
        """Padded width of observations: the maximum over the tasks."""
        return max(self.observation_dims)

    @property
    def action_dim(self) -> int:
        """Padded width of actions: the maximum over the tasks."""
        return max(self.action_dims)

    def index(self, name: str) -> int:
        """Index of a task.

        Raises:
            ConfigurationError: if the set does not contain it.
        """
        if name not in self.names:
            near = nearest(str(name), self.names)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self.names)}"
            raise ConfigurationError(f"task {name!r} is not in the task set {self.name}: {hint}")
        return self.names.index(name)


def task_set(tasks: str | Sequence[str]) -> TaskSet:
    """Create the task set of a configuration.

    Args:
        tasks (str or sequence of str): ``"mt30"``, ``"mt80"``, the path of a YAML file with a list of names,
            comma-separated names, or a sequence of names.

    Raises:
        ConfigurationError: if a task is unknown or repeated, there are no tasks, or the file is not a list.

    Examples:
        >>> from pwm_torchrl.envs.tasks import task_set
        >>> tasks = task_set("pendulum-swingup,cup-catch")
        >>> tasks.action_dims, tasks.observation_dim
        ((1, 2), 8)
    """
    if isinstance(tasks, str):
        label = tasks
        if tasks in PUBLISHED_SETS:
            names: Sequence[str] = PUBLISHED_SETS[tasks]
        elif tasks.endswith((".yaml", ".yml")):
            names, label = _from_file(Path(tasks).expanduser()), Path(tasks).stem
        else:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            _check_set_name(names)
    else:
        names, label = list(tasks), ",".join(tasks)
    if not names:
        raise ConfigurationError("tasks is empty: name at least one task, or mt30 or mt80")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ConfigurationError(f"tasks={label} contains {', '.join(repeated)} more than once")
    return TaskSet(label, tuple(task_info(name) for name in names))


def _check_set_name(names: Sequence[str]) -> None:
    """Treat a single word without a hyphen as a misspelt set rather than a misspelt task."""
    if len(names) == 1 and "-" not in names[0] and nearest(names[0], PUBLISHED_SETS):
        raise ConfigurationError(
            f"tasks={names[0]!r} is not a task set: did you mean {nearest(names[0], PUBLISHED_SETS)}?"
        )


def _from_file(path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"the task list {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the task list {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(f"the task list {path} must be a list of task names, one '- name' per line")
    return content
