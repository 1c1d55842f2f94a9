"""Simulator state as tensors and plain values, so that a checkpoint loads with ``weights_only=True``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["decode", "encode", "is_plain", "load_attributes", "load_random", "save_attributes", "save_random"]

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
    """Inverse of :func:`encode`; arrays come back as fresh copies."""
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
    """The plain attributes of an object, by name: what a simulator written in Python keeps its state in."""
    attributes = vars(owner).items()
    return {name: encode(v) for name, v in attributes if name not in skip and is_plain(v)}


def load_attributes(owner: Any, saved: dict[str, Any]) -> None:
    """Put back what :func:`save_attributes` gave."""
    for name, value in saved.items():
        setattr(owner, name, decode(value))


def save_random(generator: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
    """State of a numpy random generator of either generation."""
    if isinstance(generator, np.random.RandomState):
        return encode(generator.get_state(legacy=False))
    return encode(generator.bit_generator.state)


def load_random(generator: np.random.Generator | np.random.RandomState, saved: dict[str, Any]) -> None:
    """Put back what :func:`save_random` gave."""
    state = decode(saved)
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
