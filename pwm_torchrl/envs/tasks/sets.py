"""Ordered sets of tasks: the index of a task in data, checkpoints and embeddings, and the widths that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.envs.tasks.info import TaskInfo, task_info
from pwm_torchrl.envs.tasks.published import MT30, MT80
from pwm_torchrl.errors import ConfigurationError, nearest

__all__ = ["PUBLISHED_SETS", "TaskSet", "task_set"]

#: Names of the tasks of published sets, in the order in which data and checkpoints number them.
PUBLISHED_SETS: dict[str, tuple[str, ...]] = {"mt30": MT30, "mt80": MT80}


@dataclass(frozen=True)
class TaskSet:
    """Tasks in a fixed order; a task's index is its place.

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
        """Width to which observations are padded: that of the widest task."""
        return max(self.observation_dims)

    @property
    def action_dim(self) -> int:
        """Width to which actions are padded."""
        return max(self.action_dims)

    def index(self, name: str) -> int:
        """Place of a task.

        Raises:
            ConfigurationError: if the set does not have it.
        """
        if name not in self.names:
            near = nearest(str(name), self.names)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self.names)}"
            raise ConfigurationError(f"task {name!r} is not in the task set {self.name}: {hint}")
        return self.names.index(name)


def task_set(tasks: str | Sequence[str]) -> TaskSet:
    """The set that a configuration names.

    Args:
        tasks (str or sequence of str): ``"mt30"``, ``"mt80"``, the path of a YAML file with a list of names, names
            separated by commas, or a sequence of names.

    Raises:
        ConfigurationError: for unknown, repeated or no tasks, or a file that is no list.

    Examples:
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
        raise ConfigurationError(f"tasks={label}: {', '.join(repeated)} is there more than once")
    return TaskSet(label, tuple(task_info(name) for name in names))


def _check_set_name(names: Sequence[str]) -> None:
    """A lone word without a hyphen is rather a misspelt set than a misspelt task."""
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
