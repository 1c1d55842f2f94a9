"""Task registry: MT30, MT80 and users' own tasks, with their dimensions, lengths and scores.

Importing it loads no simulator and no torch, so that ``data`` and the commands can use it. Makers are loaded on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pwm_torchrl.envs.tasks.registry import (
    MT30,
    MT80,
    PUBLISHED_SETS,
    TaskInfo,
    TaskSet,
    known_tasks,
    register_task,
    task_info,
    task_set,
)

if TYPE_CHECKING:
    from pwm_torchrl.envs.makers import make_custom_dm_control_env, make_metaworld_env, make_task_env

__all__ = [
    "MT30",
    "MT80",
    "PUBLISHED_SETS",
    "TaskInfo",
    "TaskSet",
    "known_tasks",
    "make_custom_dm_control_env",
    "make_metaworld_env",
    "make_task_env",
    "register_task",
    "task_info",
    "task_set",
]

_MAKERS = ("make_custom_dm_control_env", "make_metaworld_env", "make_task_env")


def __getattr__(name: str) -> Any:
    if name in _MAKERS:
        return getattr(importlib.import_module("pwm_torchrl.envs.makers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
