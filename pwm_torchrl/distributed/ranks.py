"""Several processes that train one run: which one this is, how they meet, and how tensors travel between them."""

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
from pwm_torchrl.distributed.rendezvous import Place, find_place
from pwm_torchrl.errors import RankFault, status_of
from pwm_torchrl.terminal import warn

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


#: How long a rank waits for the others within an update; compiling is the longest that keeps one of them busy.
WORK_TIMEOUT = timedelta(minutes=30)
#: How long the others wait for rank 0 to collect and evaluate. That it died they are told at once.
COMMAND_TIMEOUT = timedelta(days=1)
#: Bytes of a command that are sent without announcing its length, and of a rank's verdict.
HEAD_BYTES, VERDICT_BYTES = 4096, 256

FINE, REFUSED, FAILED = 0, 1, 2


class Refused(MemoryError):
    """Another rank ran out of memory."""


class Ranks:
    """The processes of a run, seen from one of them; waits until all of them are there.

    Args:
        place (Place): which one this is.

    Raises:
        RankFault: if the others cannot be reached.
    """

    def __init__(self, place: Place) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self.device = torch.device("cpu")
        self.idle = True  # no update is under way: the others wait for a command
        self.ended: str | None = None  # in order, with this status of the run: all leave
        self.status = "finished"  # of the run, if no error ends it; rank 0's to set
        self.broken = False
        self._verdict = torch.zeros(VERDICT_BYTES, dtype=torch.uint8)
        self._verdicts = [torch.zeros_like(self._verdict) for _ in range(self.size)]
        place.export()
        with self.communicating():
            dist.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=WORK_TIMEOUT)
            self._commands = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        self.data_group: dist.ProcessGroup | None = None  # of the tensors, if not the default group

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Exchange tensors of this device from now on; all ranks call this together."""
        self.device = device
        with self.communicating():
            if device.type == "cuda" and self.data_group is None:
                torch.cuda.set_device(device)
                self.data_group = dist.new_group(backend="nccl", timeout=WORK_TIMEOUT)

    def share(self, count: int, rank: int | None = None) -> slice:
        """The rows of a batch of ``count`` that are this rank's or another's; their numbers differ by 1 at most."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.size)
        first = rank * each + min(rank, more)
        return slice(first, first + each + (rank < more))

    def largest_share(self, count: int) -> int:
        """Rows of the largest share, which is rank 0's."""
        return -(-count // self.size)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Inside, an error is one of the connection between the ranks."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.broken = True
            text = " ".join(str(error).rpartition("] ")[2].split())[:200]  # before it, where in the library
            raise RankFault(
                f"Rank {self.rank} of {self.size} cannot reach the others: one of them ended or is stuck ({text})."
            ) from error

    # Commands, from rank 0 to the others ------------------------------------------------------------------------------

    def say(self, command: Mapping[str, Any]) -> None:
        """Send plain values to the others; rank 0 only."""
        content = torch.frombuffer(bytearray(json.dumps(command).encode()), dtype=torch.uint8)
        head = torch.zeros(HEAD_BYTES, dtype=torch.uint8)
        head[:8] = torch.tensor([len(content)]).view(torch.uint8)
        inline = content[: HEAD_BYTES - 8]
        head[8 : 8 + len(inline)] = inline
        with self.communicating():
            dist.broadcast(head, 0, group=self._commands)
            if len(content) > len(inline):
                dist.broadcast(content, 0, group=self._commands)

    def hear(self) -> dict[str, Any]:
        """Wait for what rank 0 says."""
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        with self.communicating():
            dist.broadcast(head, 0, group=self._commands)
            length = int(head[:8].view(torch.int64))
            content = head[8 : 8 + length]
            if length > HEAD_BYTES - 8:
                content = torch.empty(length, dtype=torch.uint8)
                dist.broadcast(content, 0, group=self._commands)
        command: dict[str, Any] = json.loads(bytes(content.tolist()))
        self.ended = command.get("end")
        return command

    # Agreement --------------------------------------------------------------------------------------------------------

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All ranks leave this block, or none does.

        Raises:
            Refused: if memory ran out on another rank, so that the update is given up everywhere.
            RankFault: if another rank failed otherwise.
        """
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            refused = is_out_of_memory(error)
            self._agree(REFUSED if refused else FAILED, text if refused else f"{type(error).__name__}: {text}")
            raise
        self._agree(FINE, "")

    def _agree(self, verdict: int, text: str) -> None:
        content = text.encode()[: VERDICT_BYTES - 2]
        self._verdict[0], self._verdict[1] = verdict, len(content)
        self._verdict[2 : 2 + len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        with self.communicating():
            dist.all_gather(self._verdicts, self._verdict)
        said = {
            rank: (int(each[0]), bytes(each[2 : 2 + int(each[1])].tolist()).decode(errors="replace"))
            for rank, each in enumerate(self._verdicts)
            if each[0] != FINE
        }
        if not said:
            return
        failed = next((rank for rank, (each, _) in said.items() if each == FAILED), None)
        if failed is not None:
            self.broken = True
            if verdict == FAILED:  # what failed here says more
                return
            raise RankFault(f"Rank {failed} of {self.size} failed: {said[failed][1]}.")
        self.idle = True
        if verdict == FINE:
            first = next(iter(said))
            raise Refused(f"rank {first}: {said[first][1]}")

    def compare(self, names: Sequence[str], values: Tensor) -> None:
        """Raise unless whole numbers, one by name, are the same on all ranks.

        Raises:
            RankFault: if they are not.
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
        """Begin an update: a command to the others, and to each rank its share of a batch; rank 0 only.

        Args:
            command (Mapping): plain values.
            rows (TensorDictBase): one row for each of the batch.
            common (TensorDictBase): the same for all.

        Returns:
            TensorDictBase: ``"rows"``, those of this rank, and ``"common"``.
        """
        parcel = TensorDict({ROWS: rows.detach(), COMMON: common.detach()}, batch_size=[])
        layout = Layout.of(parcel)
        self.idle = False
        self.say({**command, "count": len(rows), "layout": layout.as_json()})
        return self._scatter(layout, len(rows), parcel)

    def receive(self, command: Mapping[str, Any]) -> TensorDictBase:
        """The counterpart of :meth:`send`: this rank's rows of the batch, and what is common to all."""
        self.idle = False
        return self._scatter(Layout.from_json(command["layout"]), command["count"], None)

    def _scatter(self, layout: Layout, count: int, parcel: TensorDictBase | None) -> TensorDictBase:
        mine = layout.resized(self.rows_of(count))
        with self.agreeing():
            # Of one length, as collectives want it: the shorter shares end earlier.
            length = layout.resized(self.largest_share(count)).nbytes
            buffer = self.room(length)
            parts = None
            if parcel is not None:
                parts = [self.room(length) for _ in range(self.size)]
                for rank, part in enumerate(parts):
                    layout.resized(self.rows_of(count, rank)).pack(parcel, self.share(count, rank), part)
        with self.communicating():
            dist.scatter(buffer, parts, src=0, group=self.data_group)
        return mine.unpack(buffer)

    def rows_of(self, count: int, rank: int | None = None) -> int:
        """How many rows a share has."""
        share = self.share(count, rank)
        return share.stop - share.start

    def room(self, length: int) -> Tensor:
        """For a parcel of so many bytes."""
        return torch.empty(length, dtype=torch.uint8, device=self.device)

    def copy(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Rank 0's tensors, on every rank."""
        if self.leads and tensors is not None:
            self.say({name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()})
            with self.agreeing():
                out = {name: x.detach().to(self.device).contiguous() for name, x in tensors.items()}
        else:
            heard = self.hear()
            with self.agreeing():
                out = {
                    name: torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                    for name, (dtype, shape) in heard.items()
                }
        with self.communicating():
            for tensor in out.values():
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=self.data_group)
        return out

    def close(self, status: str) -> None:
        """Leave; where the others wait for a command, they are told to, and the status of rank 0's run.

        Otherwise they lose the connection.
        """
        if self.broken or not (self.leads or self.ended) or not self.idle:
            if self.data_group is not None:
                self.data_group.abort()  # or this process would wait for an operation that never ends
            return
        try:
            if self.leads:
                self.say({"end": status})
            with self.communicating():
                dist.barrier()
                dist.destroy_process_group()
        except RankFault as fault:  # all there was to do is done
            warn(str(fault))


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """Inside, this process is one of the ranks that its launcher started; ``None`` if it is alone."""
    place = find_place()
    if place is None:
        yield None
        return
    ranks = Ranks(place)
    try:
        yield ranks
    except BaseException as error:
        ranks.close(status_of(error))
        raise
    ranks.close(ranks.status)
