"""Environments with one interface: makers for gymnasium, dm_control, Meta-World, Brax, dflex and rewarped, the task
registry, saved states, rendering, imagination as an environment, and planning.

May import from ``modules`` and ``objectives``. Each maker loads its own environment library. Names are loaded on first
use, so that the task registry can be used without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pwm_torchrl.errors import EnvironmentFault

if TYPE_CHECKING:
    from pwm_torchrl.envs.dflex import DFlexEnv, make_dflex_env
    from pwm_torchrl.envs.differentiable import DifferentiableEnv, make_torchrl_pendulum
    from pwm_torchrl.envs.env_state import env_state_support, load_env_state, save_env_state
    from pwm_torchrl.envs.factory import make_env
    from pwm_torchrl.envs.facts import report_env
    from pwm_torchrl.envs.imagination import LatentImaginationEnv
    from pwm_torchrl.envs.makers import make_brax_env, make_dm_control_env, make_gymnasium_env, make_task_env
    from pwm_torchrl.envs.mppi import PolicySeededMPPI
    from pwm_torchrl.envs.rendering import render_frame
    from pwm_torchrl.envs.rewarped import make_rewarped_env
    from pwm_torchrl.envs.standard import EnvInfo, env_info, standardize
    from pwm_torchrl.envs.tasks.registry import register_task

__all__ = [
    "DFlexEnv",
    "DifferentiableEnv",
    "EnvInfo",
    "EnvironmentFault",
    "LatentImaginationEnv",
    "PolicySeededMPPI",
    "env_info",
    "env_state_support",
    "load_env_state",
    "make_brax_env",
    "make_dflex_env",
    "make_dm_control_env",
    "make_env",
    "make_gymnasium_env",
    "make_rewarped_env",
    "make_task_env",
    "make_torchrl_pendulum",
    "register_task",
    "render_frame",
    "report_env",
    "save_env_state",
    "standardize",
]

_HOME = {
    "DFlexEnv": "dflex",
    "DifferentiableEnv": "differentiable",
    "EnvInfo": "standard",
    "LatentImaginationEnv": "imagination",
    "PolicySeededMPPI": "mppi",
    "env_info": "standard",
    "env_state_support": "env_state",
    "load_env_state": "env_state",
    "make_brax_env": "makers",
    "make_dflex_env": "dflex",
    "make_dm_control_env": "makers",
    "make_env": "factory",
    "make_gymnasium_env": "makers",
    "make_rewarped_env": "rewarped",
    "make_task_env": "makers",
    "make_torchrl_pendulum": "differentiable",
    "register_task": "tasks.registry",
    "render_frame": "rendering",
    "report_env": "facts",
    "save_env_state": "env_state",
    "standardize": "standard",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
