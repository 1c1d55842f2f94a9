"""Real environments behind one interface: makers for gymnasium, dm_control and dflex, state saving, rendering.

May import from ``modules`` and ``objectives``; environment libraries are loaded by the maker that needs them.
"""

from __future__ import annotations

from pwm_torchrl.envs.dflex import DFlexEnv
from pwm_torchrl.envs.dflex_maker import make_dflex_env
from pwm_torchrl.envs.dm_control_env import make_dm_control_env
from pwm_torchrl.envs.factory import make_env
from pwm_torchrl.envs.gym_env import make_gymnasium_env
from pwm_torchrl.envs.info import EnvInfo, env_info
from pwm_torchrl.envs.rendering import render_frame
from pwm_torchrl.envs.report import report_env
from pwm_torchrl.envs.standardize import standardize
from pwm_torchrl.envs.state import env_state_support, load_env_state, save_env_state
from pwm_torchrl.errors import EnvironmentFault

__all__ = [
    "DFlexEnv",
    "EnvInfo",
    "EnvironmentFault",
    "env_info",
    "env_state_support",
    "load_env_state",
    "make_dflex_env",
    "make_dm_control_env",
    "make_env",
    "make_gymnasium_env",
    "render_frame",
    "report_env",
    "save_env_state",
    "standardize",
]
