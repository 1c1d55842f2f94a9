"""Saves and loads the state of an environment as tensors and plain values, so that runs can resume exactly."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase

from pwm_torchrl.envs.standard import env_layers
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "PhysicsState",
    "decode",
    "encode",
    "env_state_support",
    "is_plain",
    "load_attributes",
    "load_env_state",
    "load_random",
    "save_attributes",
    "save_env_state",
    "save_random",
]


def env_state_support(env: EnvBase) -> str:
    """What :func:`save_env_state` can save of ``env``, as text that begins with ``exact`` or ``none``."""
    for layer in env_layers(env):
        told = getattr(type(layer), "state_support", None) or layer.__dict__.get("state_support")
        if told:
            return str(told)
    if _owner(env) is not None:
        return "exact: by the environment's own save_state()"
    return "none: the environment has no save_state() and load_state(state), so a resumed run begins with new episodes"


def save_env_state(env: EnvBase) -> dict[str, Any] | None:
    """The state from which :func:`load_env_state` continues exactly.

    Args:
        env (EnvBase): an environment from one of the makers, or any environment with methods ``save_state()`` and
            ``load_state(state)``, possibly inside transforms.

    Returns:
        dict, optional: tensors, numbers, strings and containers of them (``torch.load(weights_only=True)`` can read
        it), or ``None`` if the environment cannot be saved (see :func:`env_state_support`).
    """
    layer = _owner(env)
    return None if layer is None else layer.save_state()


def load_env_state(env: EnvBase, state: dict[str, Any]) -> None:
    """Restore a state from :func:`save_env_state`.

    TorchRL keeps the current observation in the collector's TensorDict, not in the environment: restore it as well, and
    do not reset the environment in between.

    Args:
        env (EnvBase): an environment of the same configuration.
        state (dict): the state.

    Raises:
        ConfigurationError: if this environment cannot be loaded, or has another number of sub-environments.
    """
    layer = _owner(env)
    if layer is None:
        raise ConfigurationError(f"the state of this environment cannot be loaded ({env_state_support(env)})")
    layer.load_state(state)


def _owner(env: EnvBase) -> Any | None:
    """The outermost layer that can save its state."""
    for layer in env_layers(env):
        if hasattr(type(layer), "save_state") and hasattr(type(layer), "load_state"):
            return layer if getattr(layer, "can_save_state", True) else None
    return None


_SCALAR = "numpy_scalar"
_TUPLE = "tuple"


def is_plain(value: Any) -> bool:
    """Whether :func:`encode` can store ``value`` exactly."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in "biuf" and value.dtype.itemsize <= 8
    return value is None or isinstance(value, (bool, int, float, str))


def encode(value: Any) -> Any:
    """Numpy arrays and scalars as tensors, containers item by item, the rest unchanged."""
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, np.generic):
        return {_SCALAR: torch.tensor(np.asarray(value))}
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`; arrays are copies."""
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_SCALAR}:
            return value[_SCALAR].numpy()[()]
        if value.keys() == {_TUPLE}:
            return tuple(decode(item) for item in value[_TUPLE])
        return {key: decode(item) for key, item in value.items()}
    return value


def save_attributes(owner: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain attributes of an object by name, which hold the state of a simulator written in Python."""
    attributes = vars(owner).items()
    return {name: encode(v) for name, v in attributes if name not in skip and is_plain(v)}


def load_attributes(owner: Any, saved: dict[str, Any]) -> None:
    """Restore attributes from :func:`save_attributes`."""
    for name, value in saved.items():
        setattr(owner, name, decode(value))


def save_random(generator: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
    """State of a numpy random generator of the new or the legacy class."""
    if isinstance(generator, np.random.RandomState):
        return encode(generator.get_state(legacy=False))
    return encode(generator.bit_generator.state)


def load_random(generator: np.random.Generator | np.random.RandomState, saved: dict[str, Any]) -> None:
    """Restore a state from :func:`save_random`."""
    state = decode(saved)
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


# MuJoCo's physics, for all libraries that use it ----------------------------------------------------------------------


class PhysicsState:
    """Saves and loads a MuJoCo model and its data.

    Args:
        model: a newly built ``mujoco.MjModel``, before the first reset.
    """

    def __init__(self, model: Any) -> None:
        self._built = {name: _digest(array) for name, array in _arrays(model).items()}

    def shares_memory(self, data: Any, array: np.ndarray) -> bool:
        """Whether an array is a view of the physics' data rather than a copy."""
        return any(np.may_share_memory(array, own) for own in _arrays(data).values())

    def save(self, model: Any, data: Any) -> dict[str, Any]:
        """Arrays of ``data``, its clock, and the arrays of ``model`` that have changed since it was built."""
        changed = {
            name: torch.tensor(array)
            for name, array in _arrays(model).items()
            if _digest(array) != self._built.get(name)
        }
        kept = {name: torch.tensor(array) for name, array in _arrays(data).items()}
        return {"model": changed, "data": kept, "time": float(data.time)}

    def load(self, model: Any, data: Any, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save` into a model of the same kind."""
        import mujoco

        _write(model, state["model"])
        _write(data, state["data"])
        data.time = state["time"]
        # Contacts and constraints are in an arena of variable size, so they are recomputed from the state. This
        # overwrites derived arrays and the solver's warm start, so the saved ones are written again.
        mujoco.mj_forward(model, data)
        _write(data, state["data"])
        data.time = state["time"]


def _arrays(owner: Any) -> dict[str, np.ndarray]:
    """The writable numeric arrays of fixed size of an MjModel or MjData."""
    found = {}
    for name in dir(owner):
        if name.startswith(("_", "efc_")) or name in _ARENA:
            continue
        value = getattr(owner, name, None)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "biuf" and value.flags.writeable:
            found[name] = value
    return found


# Their size depends on the current number of contacts and constraints.
_ARENA = frozenset({"contact", "iefc_id", "solver_niter"})


def _write(owner: Any, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in saved.items():
        target = getattr(owner, name)
        if target.shape == tuple(tensor.shape):
            target[...] = tensor.numpy()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
