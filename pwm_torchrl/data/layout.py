"""Stored entries of a step, their layout as bytes, and uniform sampling of slices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.errors import ConfigurationError

# Stored entries of a step and their layout in a record of bytes -------------------------------------------------------


#: Keys of a collected batch that are stored.
STORED_KEYS: tuple[str | tuple[str, ...], ...] = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
)


def key_name(key: str | tuple[str, ...]) -> str:
    """A nested key as a string: ``"next.observation"``."""
    return key if isinstance(key, str) else ".".join(key)


@dataclass(frozen=True)
class Field:
    """Position of one of :data:`STORED_KEYS` in a record.

    Attributes:
        shape: shape of one step's entry, without batch dimensions.
        dtype: type of its elements.
        start: index of its first byte in the record.
        stop: index after its last byte.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


class RecordLayout:
    """Layout of a record: the entries of one step, packed without gaps.

    Because entries are packed, a slice of consecutive steps needs one read instead of one per key, and no padding.

    Args:
        entries (dict): shape and dtype of one step's entry, for each of :data:`STORED_KEYS`.
    """

    def __init__(self, entries: Mapping[str | tuple[str, ...], tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.fields: dict[str | tuple[str, ...], Field] = {}
        start = 0
        for key in STORED_KEYS:
            shape, dtype = entries[key]
            stop = start + math.prod(shape) * dtype.itemsize
            self.fields[key] = Field(tuple(shape), dtype, start, stop)
            start = stop
        self.record_bytes = start

    @classmethod
    def of(cls, batch: TensorDictBase) -> RecordLayout:
        """The layout of a batch ``[N, T]``."""
        values = {key: batch.get(key) for key in STORED_KEYS}
        return cls({key: (tuple(value.shape[2:]), value.dtype) for key, value in values.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordLayout) and self.fields == other.fields

    __hash__ = None  # type: ignore[assignment]

    def pack(self, batch: TensorDictBase) -> Tensor:
        """Records of a batch ``[N, T]`` on the CPU: uint8 ``[N, T, R]``."""
        size = batch.batch_size
        records = torch.empty(*size, self.record_bytes, dtype=torch.uint8)
        for key, field in self.fields.items():
            numbers = batch.get(key).contiguous().reshape(*size, math.prod(field.shape))
            records[..., field.start : field.stop] = numbers.view(torch.uint8)
        return records

    def unpack(self, records: Tensor) -> TensorDict:
        """The entries of records uint8 ``[*size, R]``, copied."""
        size = records.shape[:-1]
        # A field may not be aligned for its dtype, so it is copied before it is viewed as numbers.
        entries = {
            key: records[..., field.start : field.stop]
            .clone(memory_format=torch.contiguous_format)
            .view(field.dtype)
            .reshape(*size, *field.shape)
            for key, field in self.fields.items()
        }
        out = TensorDict({}, batch_size=size, device="cpu")
        for key, value in entries.items():
            out.set(key, value)
        return out

    def describe(self) -> dict[str, Any]:
        """The layout as JSON-compatible values."""
        return {
            key_name(key): {"shape": list(field.shape), "dtype": str(field.dtype).removeprefix("torch.")}
            for key, field in self.fields.items()
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> RecordLayout:
        """Inverse of :meth:`describe`."""
        entries: dict[str | tuple[str, ...], tuple[tuple[int, ...], torch.dtype]] = {}
        for key in STORED_KEYS:
            entry = description[key_name(key)]
            dtype = {str(d).removeprefix("torch."): d for d in _DTYPES}[entry["dtype"]]
            entries[key] = (tuple(entry["shape"]), dtype)
        return cls(entries)


_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def refuse_other_shape(filled: int, envs: int, steps: int, num_envs: int, capacity: int) -> None:
    """Refuse a checkpoint of a replay buffer with another shape.

    Raises:
        ConfigurationError: if the number of environments or the capacity differs.
    """
    if envs != num_envs or filled != min(steps, capacity):
        raise ConfigurationError(
            f"The checkpoint's replay holds {filled} steps of {envs} environments; this configuration has "
            f"env.num_envs={num_envs} and a capacity of {capacity} steps."
        )


# Sampling of slices ---------------------------------------------------------------------------------------------------


def draw_starts(count: int, length: int, filled: int, envs: int) -> tuple[Tensor, Tensor]:
    """Draw uniform starts of slices of ``length`` steps: (steps after the oldest, environment), int64 ``[count]`` each.

    All storages use this function and the CPU's generator, so a seed gives the same batches on each of them.
    """
    return torch.randint(filled - length + 1, (count,)), torch.randint(envs, (count,))
