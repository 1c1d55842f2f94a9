"""Exchange of commands and tensors between the processes (ranks) that train one run.

Tensors are packed by hand into one byte buffer instead of by ``TensorDict.consolidate``. Collectives need buffers of
equal length while the shares of a batch differ by a row, ``consolidate`` cannot write a slice of the rows into a given
buffer, and it is rebuilt from metadata by a private function. Packing a batch of 1024 slices for 4 ranks took 0.8 ms
and copied 5.5 MB by hand; with ``consolidate``, 2.8 ms and 9.6 MB (tensordict 0.14.3, one thread).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.distributed.rendezvous import Rendezvous, find_rendezvous
from pwm_torchrl.errors import LOST_RANKS, RankFault, status_of
from pwm_torchrl.terminal import warn

#: Each tensor begins at a multiple of this many bytes.
ALIGNMENT = 16
#: The two parts of a payload: tensors with one row per row of the batch, and tensors that are the same for all ranks.
ROWS, COMMON = "rows", "common"


@dataclass(frozen=True)
class Entry:
    """One tensor of a payload."""

    key: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def resized(self, rows: int) -> Entry:
        """A copy with another number of rows; an entry of the common part is unchanged."""
        return self if self.key[0] != ROWS else Entry(self.key, self.dtype, (rows, *self.shape[1:]))


class Layout:
    """Positions of a payload's tensors in a byte buffer.

    Args:
        entries (sequence of Entry): the tensors, in order.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.offsets: list[int] = []
        self.nbytes = 0
        for entry in self.entries:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, payload: TensorDictBase) -> Layout:
        """Layout of a payload with the parts ``rows`` and, optionally, ``common``."""
        return cls(
            [
                Entry((key,) if isinstance(key, str) else key, value.dtype, tuple(value.shape))
                for key, value in payload.items(True, True)
            ]
        )

    def resized(self, rows: int) -> Layout:
        """Layout of a payload with another number of rows."""
        return Layout([entry.resized(rows) for entry in self.entries])

    def pack(self, payload: TensorDictBase, rows: slice, buffer: Tensor) -> None:
        """Write ``rows`` of a payload into a uint8 buffer; this is the layout of these rows, not of the whole batch."""
        for entry, view in zip(self.entries, self._views(buffer), strict=True):
            value = payload.get(entry.key)
            view.copy_(value[rows] if entry.key[0] == ROWS else value)

    def unpack(self, buffer: Tensor) -> TensorDict:
        """The payload in a buffer, as views of it."""
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
        """JSON-compatible values for :meth:`from_json`."""
        return [[list(e.key), str(e.dtype).removeprefix("torch."), list(e.shape)] for e in self.entries]

    @classmethod
    def from_json(cls, content: list[list[Any]]) -> Layout:
        """Inverse of :meth:`as_json`."""
        return cls([Entry(tuple(key), getattr(torch, dtype), tuple(shape)) for key, dtype, shape in content])


class RankSum:
    """Sum of tensors over all ranks, exchanged as a single tensor.

    Args:
        ranks (Ranks): the processes.
        tensors (sequence of Tensor): this rank's summands. ``None`` means that a tensor is absent on all ranks; its sum
            is ``None``.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor | None]) -> None:
        self.ranks = ranks
        self.kinds = [None if x is None else (x.shape, x.dtype) for x in tensors]
        self.flat = torch.cat([x.detach().reshape(-1) for x in tensors if x is not None])

    def exchange(self) -> None:
        """Add up the tensors of all ranks."""
        with self.ranks.communicating():
            dist.all_reduce(self.flat, group=self.ranks.data_group)

    def tensors(self) -> list[Tensor | None]:
        """The sums, as views of one tensor."""
        parts = iter(self.flat.split([math.prod(kind[0]) for kind in self.kinds if kind is not None]))
        return [None if kind is None else next(parts).view(kind[0]).to(kind[1]) for kind in self.kinds]


class RankGather:
    """Gathers the shares of a batch on rank 0.

    Args:
        ranks (Ranks): the processes.
        rows (TensorDictBase): this rank's share.
        count (int): rows of the whole batch.
    """

    def __init__(self, ranks: Ranks, rows: TensorDictBase, count: int) -> None:
        self.ranks, self.rows, self.count = ranks, rows, count
        payload = TensorDict({ROWS: rows}, batch_size=[])
        self.layout = Layout.of(payload)
        nbytes = self.layout.resized(ranks.largest_share(count)).nbytes
        self.buffer = ranks.new_buffer(nbytes)
        self.layout.pack(payload, slice(None), self.buffer)
        self.parts = [ranks.new_buffer(nbytes) for _ in range(ranks.size)] if ranks.is_rank_zero else None

    def exchange(self) -> None:
        """Send the shares to rank 0."""
        with self.ranks.communicating():
            dist.gather(self.buffer, self.parts, dst=0, group=self.ranks.data_group)

    def whole(self) -> TensorDictBase:
        """The whole batch on rank 0, this rank's share on the others."""
        if self.parts is None:
            return self.rows
        shares = [
            self.layout.resized(self.ranks.rows_of(self.count, rank)).unpack(part)[ROWS]
            for rank, part in enumerate(self.parts)
        ]
        whole: TensorDictBase = torch.cat([share.auto_batch_size_(1) for share in shares])
        whole.batch_size = [self.count, *self.rows.batch_size[1:]]
        return whole


#: Maximum time that a rank waits for the others within an update. Compilation is the longest step.
WORK_TIMEOUT = timedelta(minutes=30)
#: Maximum time that the others wait while rank 0 collects and evaluates. If rank 0 dies, they notice at once.
COMMAND_TIMEOUT = timedelta(days=1)
#: Size of a command's first message, which holds a short command entirely, and of a rank's outcome.
HEAD_BYTES, OUTCOME_BYTES = 4096, 256

OK, OUT_OF_MEMORY, FAILED = 0, 1, 2


class RemoteOutOfMemory(MemoryError):
    """Another rank ran out of memory."""


class Ranks:
    """The processes of a run; construction waits until all of them have connected.

    Args:
        rendezvous (Rendezvous): this process's rank and the address of rank 0.

    Raises:
        RankFault: if the others cannot be reached.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rank, self.size, self.local_rank = rendezvous.rank, rendezvous.size, rendezvous.local_rank
        self.device = torch.device("cpu")
        self.idle = True  # no update is running: the others wait for a command
        self.end_status: str | None = None  # set when rank 0 has ended regularly: the status of its run
        self.status = "finished"  # status of the run unless an error ends it; rank 0 sets it
        self.broken = False
        self._outcome = torch.zeros(OUTCOME_BYTES, dtype=torch.uint8)
        self._outcomes = [torch.zeros_like(self._outcome) for _ in range(self.size)]
        rendezvous.export()
        with self.communicating():
            dist.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=WORK_TIMEOUT)
            self._commands = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        self.data_group: dist.ProcessGroup | None = None  # the group for tensors, if it is not the default group

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def use_device(self, device: torch.device) -> None:
        """Exchange tensors on this device from now on; all ranks must call this together."""
        self.device = device
        with self.communicating():
            if device.type == "cuda" and self.data_group is None:
                torch.cuda.set_device(device)
                self.data_group = dist.new_group(backend="nccl", timeout=WORK_TIMEOUT)

    def share(self, count: int, rank: int | None = None) -> slice:
        """The rows of a batch of ``count`` that a rank, by default this one, computes; shares differ by at most 1."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.size)
        first = rank * each + min(rank, more)
        return slice(first, first + each + (rank < more))

    def largest_share(self, count: int) -> int:
        """Number of rows of the largest share, which is rank 0's."""
        return -(-count // self.size)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Convert errors inside the block to ``RankFault``, for blocks that only communicate."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.broken = True
            text = " ".join(str(error).rpartition("] ")[2].split())[:200]  # without the library's source location
            raise RankFault(
                f"Rank {self.rank} of {self.size} {LOST_RANKS}: one of them has ended or hangs ({text})."
            ) from error

    # Commands from rank 0 to the others -------------------------------------------------------------------------------

    def broadcast_command(self, command: Mapping[str, Any]) -> None:
        """Send JSON-compatible values to the others; rank 0 only."""
        content = torch.frombuffer(bytearray(json.dumps(command).encode()), dtype=torch.uint8)
        head = torch.zeros(HEAD_BYTES, dtype=torch.uint8)
        head[:8] = torch.tensor([len(content)]).view(torch.uint8)
        inline = content[: HEAD_BYTES - 8]
        head[8 : 8 + len(inline)] = inline
        with self.communicating():
            dist.broadcast(head, 0, group=self._commands)
            if len(content) > len(inline):
                dist.broadcast(content, 0, group=self._commands)

    def receive_command(self) -> dict[str, Any]:
        """Wait for rank 0's next command."""
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        with self.communicating():
            dist.broadcast(head, 0, group=self._commands)
            length = int(head[:8].view(torch.int64))
            content = head[8 : 8 + length]
            if length > HEAD_BYTES - 8:
                content = torch.empty(length, dtype=torch.uint8)
                dist.broadcast(content, 0, group=self._commands)
        command: dict[str, Any] = json.loads(bytes(content.tolist()))
        self.end_status = command.get("end")
        return command

    # Agreement --------------------------------------------------------------------------------------------------------

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Complete this block on all ranks, or raise an error on all of them.

        Raises:
            RemoteOutOfMemory: if another rank ran out of memory, so that all ranks abandon the update.
            RankFault: if another rank failed for another reason.
        """
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            oom = is_out_of_memory(error)
            self._share_outcome(OUT_OF_MEMORY if oom else FAILED, text if oom else f"{type(error).__name__}: {text}")
            raise
        self._share_outcome(OK, "")

    def _share_outcome(self, outcome: int, text: str) -> None:
        """Exchange the outcomes of a block, and raise another rank's error if there was none here."""
        content = text.encode()[: OUTCOME_BYTES - 2]
        self._outcome[0], self._outcome[1] = outcome, len(content)
        self._outcome[2 : 2 + len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        with self.communicating():
            dist.all_gather(self._outcomes, self._outcome)
        errors = {
            rank: (int(each[0]), bytes(each[2 : 2 + int(each[1])].tolist()).decode(errors="replace"))
            for rank, each in enumerate(self._outcomes)
            if each[0] != OK
        }
        if not errors:
            return
        failed = next((rank for rank, (each, _) in errors.items() if each == FAILED), None)
        if failed is not None:
            self.broken = True
            if outcome == FAILED:  # this rank's own error is raised instead
                return
            raise RankFault(f"Rank {failed} of {self.size} failed: {errors[failed][1]}.")
        self.idle = True
        if outcome == OK:
            first = next(iter(errors))
            raise RemoteOutOfMemory(f"rank {first}: {errors[first][1]}")

    def require_equal(self, names: Sequence[str], values: Tensor) -> None:
        """Check that integers, one per name, are the same on all ranks.

        Raises:
            RankFault: if they differ; the message names the rank and the values.
        """
        mine = values.cpu()
        all_values = [torch.empty_like(mine) for _ in range(self.size)]
        with self.communicating():
            dist.all_gather(all_values, mine)
        for rank, theirs in enumerate(all_values):
            different = [name for name, same in zip(names, (theirs == all_values[0]).tolist(), strict=True) if not same]
            if different:
                self.broken = True
                raise RankFault(f"Rank {rank} of {self.size} differs from rank 0 in {', '.join(different)}.")

    # Tensors ----------------------------------------------------------------------------------------------------------

    def send(self, command: Mapping[str, Any], rows: TensorDictBase, common: TensorDictBase) -> TensorDictBase:
        """Start an update: send a command to the others and each rank's share of the batch; rank 0 only.

        Args:
            command (Mapping): JSON-compatible values.
            rows (TensorDictBase): tensors with one row per row of the batch; each rank gets its share.
            common (TensorDictBase): tensors that all ranks get.

        Returns:
            TensorDictBase: ``"rows"`` with rank 0's share, and ``"common"``.
        """
        payload = TensorDict({ROWS: rows.detach(), COMMON: common.detach()}, batch_size=[])
        layout = Layout.of(payload)
        self.idle = False
        self.broadcast_command({**command, "count": len(rows), "layout": layout.as_json()})
        return self._scatter(layout, len(rows), payload)

    def receive(self, command: Mapping[str, Any]) -> TensorDictBase:
        """Receive this rank's ``"rows"`` and the ``"common"`` tensors after a command of :meth:`send`."""
        self.idle = False
        return self._scatter(Layout.from_json(command["layout"]), command["count"], None)

    def _scatter(self, layout: Layout, count: int, payload: TensorDictBase | None) -> TensorDictBase:
        own_layout = layout.resized(self.rows_of(count))
        with self.all_or_none():
            # Collectives need buffers of equal length; a smaller share leaves the end of its buffer unused.
            nbytes = layout.resized(self.largest_share(count)).nbytes
            buffer = self.new_buffer(nbytes)
            parts = None
            if payload is not None:
                parts = [self.new_buffer(nbytes) for _ in range(self.size)]
                for rank, part in enumerate(parts):
                    layout.resized(self.rows_of(count, rank)).pack(payload, self.share(count, rank), part)
        with self.communicating():
            dist.scatter(buffer, parts, src=0, group=self.data_group)
        return own_layout.unpack(buffer)

    def rows_of(self, count: int, rank: int | None = None) -> int:
        """Number of rows of a rank's share, by default this one's."""
        share = self.share(count, rank)
        return share.stop - share.start

    def new_buffer(self, nbytes: int) -> Tensor:
        """An uninitialised byte buffer on the device of the exchanged tensors."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Copy rank 0's tensors to every rank; the other ranks pass ``None``."""
        if self.is_rank_zero and tensors is not None:
            self.broadcast_command(
                {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()}
            )
            with self.all_or_none():
                out = {name: x.detach().to(self.device).contiguous() for name, x in tensors.items()}
        else:
            layout = self.receive_command()
            with self.all_or_none():
                out = {
                    name: torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                    for name, (dtype, shape) in layout.items()
                }
        with self.communicating():
            for tensor in out.values():
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=self.data_group)
        return out

    def close(self, status: str) -> None:
        """Disconnect. If the other ranks wait for a command, rank 0 first sends them the status of its run.

        Otherwise the other ranks notice that the connection is lost.
        """
        if self.broken or not (self.is_rank_zero or self.end_status) or not self.idle:
            if self.data_group is not None:
                self.data_group.abort()  # otherwise this process would wait for an operation that never completes
            return
        try:
            if self.is_rank_zero:
                self.broadcast_command({"end": status})
            with self.communicating():
                dist.barrier()
                dist.destroy_process_group()
        except RankFault as fault:  # the run is complete, so a lost connection is only a warning
            warn(str(fault))


@contextmanager
def connected_ranks() -> Iterator[Ranks | None]:
    """Connect the ranks that the launcher started, inside the block; ``None`` if this is the only process."""
    rendezvous = find_rendezvous()
    if rendezvous is None:
        yield None
        return
    ranks = Ranks(rendezvous)
    try:
        yield ranks
    except BaseException as error:
        ranks.close(status_of(error))
        raise
    ranks.close(ranks.status)
