"""Saving and loading where an environment stands, for runs that resume exactly."""

from __future__ import annotations

from typing import Any

from torchrl.envs import EnvBase

from pwm_torchrl.envs.info import env_layers
from pwm_torchrl.errors import ConfigurationError

__all__ = ["env_state_support", "load_env_state", "save_env_state"]


def env_state_support(env: EnvBase) -> str:
    """What :func:`save_env_state` can save of ``env``, a sentence that begins with ``exact`` or ``none``."""
    for layer in env_layers(env):
        told = getattr(type(layer), "state_support", None) or layer.__dict__.get("state_support")
        if told:
            return str(told)
    if _owner(env) is not None:
        return "exact: by the environment's own save_state()"
    return "none: the environment has no save_state() and load_state(state), so a resumed run begins with new episodes"


def save_env_state(env: EnvBase) -> dict[str, Any] | None:
    """State from which :func:`load_env_state` goes on to the bit.

    Args:
        env (EnvBase): an environment from one of the makers, or any with methods ``save_state()`` and
            ``load_state(state)`` under its transforms.

    Returns:
        dict, optional: tensors, numbers, strings and containers of them (``torch.load(weights_only=True)`` reads it
        back), or ``None`` where the environment cannot be saved (see :func:`env_state_support`).
    """
    layer = _owner(env)
    return None if layer is None else layer.save_state()


def load_env_state(env: EnvBase, state: dict[str, Any]) -> None:
    """Put an environment back where :func:`save_env_state` found it.

    TorchRL keeps the present observation in the collector's TensorDict, not in the environment: restore that too, and
    do not reset in between.

    Args:
        env (EnvBase): made by the same configuration.
        state (dict): what :func:`save_env_state` returned.

    Raises:
        ConfigurationError: if this environment cannot be loaded, or has another number of sub-environments.
    """
    layer = _owner(env)
    if layer is None:
        raise ConfigurationError(f"the state of this environment cannot be loaded ({env_state_support(env)})")
    layer.load_state(state)


def _owner(env: EnvBase) -> Any | None:
    """The outermost layer that can save itself."""
    for layer in env_layers(env):
        if hasattr(type(layer), "save_state") and hasattr(type(layer), "load_state"):
            return layer if getattr(layer, "can_save_state", True) else None
    return None
