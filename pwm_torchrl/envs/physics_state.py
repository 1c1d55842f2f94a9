"""The whole state of a MuJoCo simulation, exactly.

``mj_getState`` is not enough: several gymnasium and dm_control tasks read quantities that MuJoCo derives during a step
(body positions, contact forces), and those lag behind the state. So every array of ``MjData`` is kept, and the arrays
of ``MjModel`` that a task has changed since it was built (targets move by editing the model).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

__all__ = ["PhysicsState"]


class PhysicsState:
    """Saves and loads a MuJoCo model and its data.

    Args:
        model: ``mujoco.MjModel`` as built, before the first reset.
    """

    def __init__(self, model: Any) -> None:
        self._built = {name: _digest(array) for name, array in _arrays(model).items()}

    def shares_memory(self, data: Any, array: np.ndarray) -> bool:
        """Whether an array is a window into the physics rather than a copy of its values."""
        return any(np.may_share_memory(array, own) for own in _arrays(data).values())

    def save(self, model: Any, data: Any) -> dict[str, Any]:
        """Arrays of ``data``, its clock, and the arrays of ``model`` that differ from the built ones."""
        changed = {
            name: torch.tensor(array)
            for name, array in _arrays(model).items()
            if _digest(array) != self._built.get(name)
        }
        kept = {name: torch.tensor(array) for name, array in _arrays(data).items()}
        return {"model": changed, "data": kept, "time": float(data.time)}

    def load(self, model: Any, data: Any, state: dict[str, Any]) -> None:
        """Put back what :meth:`save` gave, into a model of the same kind."""
        import mujoco

        _write(model, state["model"])
        _write(data, state["data"])
        data.time = state["time"]
        # Contacts and constraints live in an arena of changing size: recompute them from the state. That overwrites
        # derived arrays and the solver's warm start, so the saved ones are written once more.
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


# Sized by the number of contacts and constraints of the moment.
_ARENA = frozenset({"contact", "iefc_id", "solver_niter"})


def _write(owner: Any, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in saved.items():
        target = getattr(owner, name)
        if target.shape == tuple(tensor.shape):
            target[...] = tensor.numpy()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
