"""The task registry: MT30, MT80 and users' own tasks, with their dimensions, lengths and scores.

Light: importing it loads no simulator and no torch, so that data and command lines can ask it.
"""

from __future__ import annotations

from pwm_torchrl.envs.tasks.info import TaskInfo, known_tasks, register_task, task_info
from pwm_torchrl.envs.tasks.published import MT30, MT80
from pwm_torchrl.envs.tasks.sets import PUBLISHED_SETS, TaskSet, task_set

__all__ = [
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
