"""Tensors as bytes, to be sent between processes in one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

#: Every tensor begins at a multiple of so many bytes, whatever its type.
ALIGNMENT = 16
#: Of a parcel's two parts, the entries of this one have one row for each row of a batch.
ROWS, COMMON = "rows", "common"


@dataclass(frozen=True)
class Entry:
    """One tensor of a parcel."""

    key: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def resized(self, rows: int) -> Entry:
        """The same with so many rows; what is common to all has none."""
        return self if self.key[0] != ROWS else Entry(self.key, self.dtype, (rows, *self.shape[1:]))


class Layout:
    """Where the tensors of a parcel lie in its bytes.

    Args:
        entries (sequence of Entry): in order.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.offsets: list[int] = []
        self.nbytes = 0
        for entry in self.entries:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, parcel: TensorDictBase) -> Layout:
        """That of ``rows`` and, where there are any, ``common`` tensors."""
        return cls(
            [
                Entry((key,) if isinstance(key, str) else key, value.dtype, tuple(value.shape))
                for key, value in parcel.items(True, True)
            ]
        )

    def resized(self, rows: int) -> Layout:
        """That of a parcel with so many rows."""
        return Layout([entry.resized(rows) for entry in self.entries])

    def pack(self, parcel: TensorDictBase, rows: slice, buffer: Tensor) -> None:
        """Write a parcel, of which the ``rows`` only, into a uint8 buffer. This is their layout, not the whole's."""
        for entry, view in zip(self.entries, self._views(buffer), strict=True):
            value = parcel.get(entry.key)
            view.copy_(value[rows] if entry.key[0] == ROWS else value)

    def unpack(self, buffer: Tensor) -> TensorDict:
        """The parcel in a buffer, without copying."""
        out = TensorDict({}, batch_size=[])
        for entry, view in zip(self.entries, self._views(buffer), strict=True):
            out.set(entry.key, view)
        return out

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape)
            for entry, offset in zip(self.entries, self.offsets, strict=True)
        ]

    def as_json(self) -> list[list[Any]]:
        """Plain values, for :meth:`from_json`."""
        return [[list(e.key), str(e.dtype).removeprefix("torch."), list(e.shape)] for e in self.entries]

    @classmethod
    def from_json(cls, content: list[list[Any]]) -> Layout:
        """Of :meth:`as_json`."""
        return cls([Entry(tuple(key), getattr(torch, dtype), tuple(shape)) for key, dtype, shape in content])
