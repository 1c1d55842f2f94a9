"""Training: the optimization step, the trainer, evaluation, checkpoints, logging, and what a run leaves behind.

May import modules, objectives, envs and data; names are loaded on first use, so that the schema stays light.
"""

from __future__ import annotations

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from pwm_torchrl.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
