"""Training: the optimization step, the trainer, evaluation, checkpoints, logging, and what a run leaves behind.

May import modules, objectives, envs, data and memory; names are loaded on first use, so that the schema stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["evaluate_run", "film_run", "load_env", "load_policy", "load_world_model", "make_torchrl_trainer", "train"]

_HOME = {
    "train": "run",
    "evaluate_run": "load",
    "film_run": "load",
    "load_env": "load",
    "load_policy": "load",
    "load_world_model": "load",
    "make_torchrl_trainer": "torchrl_trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
