"""The public names of runs: training, evaluating and loading them. Their homes are ``run/`` and ``plugin/``.

Names are loaded on first use, so that importing this module is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_torchrl.plugin.trainer import make_torchrl_trainer
    from pwm_torchrl.run.load import evaluate_run, film_run, load_env, load_policy, load_world_model
    from pwm_torchrl.run.train import train

__all__ = ["evaluate_run", "film_run", "load_env", "load_policy", "load_world_model", "make_torchrl_trainer", "train"]

_HOME = {
    "train": "pwm_torchrl.run.train",
    "evaluate_run": "pwm_torchrl.run.load",
    "film_run": "pwm_torchrl.run.load",
    "load_env": "pwm_torchrl.run.load",
    "load_policy": "pwm_torchrl.run.load",
    "load_world_model": "pwm_torchrl.run.load",
    "make_torchrl_trainer": "pwm_torchrl.plugin.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
