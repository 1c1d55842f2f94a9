"""PWM world models for TorchRL: latent dynamics, first-order policy learning, and the tools to run them.

Importing this package is light: submodules load on first use, and no environment library, Hydra or logger is imported.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load_env", "load_policy", "load_world_model"]


def __getattr__(name: str) -> Any:
    if name in ("load_env", "load_policy", "load_world_model"):
        from pwm_torchrl import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
