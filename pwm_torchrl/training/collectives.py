"""Tensors of several ranks that are added up or brought together.

Each is prepared where it may fail, inside :meth:`~pwm_torchrl.training.distributed.Ranks.agreeing`, and exchanged
outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.training.parcels import ROWS, Layout


class Total:
    """Tensors that are added up over the ranks, as one.

    Args:
        ranks (Ranks): whose.
        tensors (sequence of Tensor): what is added up; ``None``, for one that is absent on all ranks, stays ``None``.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor | None]) -> None:
        self.ranks = ranks
        self.kinds = [None if x is None else (x.shape, x.dtype) for x in tensors]
        self.flat = torch.cat([x.detach().reshape(-1) for x in tensors if x is not None])

    def exchange(self) -> None:
        """Communicate."""
        with self.ranks.communicating():
            dist.all_reduce(self.flat, group=self.ranks.data_group)

    def tensors(self) -> list[Tensor | None]:
        """The sums: parts of one tensor."""
        parts = iter(self.flat.split([math.prod(kind[0]) for kind in self.kinds if kind is not None]))
        return [None if kind is None else next(parts).view(kind[0]).to(kind[1]) for kind in self.kinds]


class Gathering:
    """Shares of a batch that are brought together on rank 0.

    Args:
        ranks (Ranks): whose.
        rows (TensorDictBase): this rank's share.
        count (int): rows of the batch.
    """

    def __init__(self, ranks: Ranks, rows: TensorDictBase, count: int) -> None:
        self.ranks, self.rows, self.count = ranks, rows, count
        parcel = TensorDict({ROWS: rows}, batch_size=[])
        self.layout = Layout.of(parcel)
        length = self.layout.resized(ranks.largest_share(count)).nbytes
        self.buffer = ranks.room(length)
        self.layout.pack(parcel, slice(None), self.buffer)
        self.parts = [ranks.room(length) for _ in range(ranks.size)] if ranks.leads else None

    def exchange(self) -> None:
        """Communicate."""
        with self.ranks.communicating():
            dist.gather(self.buffer, self.parts, dst=0, group=self.ranks.data_group)

    def whole(self) -> TensorDictBase:
        """The batch on rank 0, this rank's share elsewhere."""
        if self.parts is None:
            return self.rows
        shares = [
            self.layout.resized(self.ranks.rows_of(self.count, rank)).unpack(part)[ROWS]
            for rank, part in enumerate(self.parts)
        ]
        whole: TensorDictBase = torch.cat([share.auto_batch_size_(1) for share in shares])
        whole.batch_size = [self.count, *self.rows.batch_size[1:]]
        return whole
