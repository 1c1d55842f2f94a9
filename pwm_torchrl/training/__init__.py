"""Training: the optimization step, the trainer, evaluation, checkpoints, logging, and what a run leaves behind.

May import modules, objectives, envs, data and memory; names are loaded on first use, so that the schema stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["evaluate_run", "film_run", "load_env", "load_policy", "load_world_model", "make_torchrl_trainer", "train"]

_HOME = {
    "train": "pwm_torchrl.run.train",
    "evaluate_run": "pwm_torchrl.training.load",
    "film_run": "pwm_torchrl.training.load",
    "load_env": "pwm_torchrl.training.load",
    "load_policy": "pwm_torchrl.training.load",
    "load_world_model": "pwm_torchrl.training.load",
    "make_torchrl_trainer": "pwm_torchrl.training.torchrl_trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
