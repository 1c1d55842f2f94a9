"""Checks of the arguments that all makers share."""

from __future__ import annotations

from pwm_torchrl.errors import ConfigurationError

__all__ = ["check_maker_arguments"]


def check_maker_arguments(num_envs: int, action_repeat: int, episode_length: int | None) -> None:
    """Raise ConfigurationError unless the numbers are positive integers (``episode_length`` may be ``None``)."""
    for key, value in (("num_envs", num_envs), ("action_repeat", action_repeat), ("episode_length", episode_length)):
        if key == "episode_length" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"env.{key}={value!r} must be an integer of at least 1")
