"""Replay buffer on disk: an append-only store of segment files, and their checksums."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.data.layout import RecordLayout, draw_starts, refuse_other_shape
from pwm_torchrl.data.segment_files import Journal, SegmentFiles, held_bytes
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import amount, free_bytes
from pwm_torchrl.memory.storage import disk_bytes, segment_steps

# Checksums of the segments, saved in checkpoints ----------------------------------------------------------------------


class Checksum:
    """CRC-32 of a segment's steps, updated while they are written.

    The steps of an environment are written in order, so one checksum per environment can be updated incrementally.

    Args:
        first (int): the first step in the segment that is included; earlier steps were not written.
        rows (list of int): CRC-32 of each environment's steps.
    """

    def __init__(self, first: int, rows: list[int]) -> None:
        self.first = first
        self.rows = rows

    def add(self, env: int, steps: memoryview) -> None:
        """Update the checksum of an environment with its next steps."""
        self.rows[env] = zlib.crc32(steps, self.rows[env])

    @property
    def value(self) -> int:
        """One number for all environments."""
        return zlib.crc32(struct.pack(f"<{len(self.rows)}I", *self.rows))


# Append-only store of segments, whose newest steps can be sampled -----------------------------------------------------


class SegmentStore:
    """Steps of N environments in files that are written once.

    A ring buffer on disk would overwrite data that the last checkpoint needs. Here, time steps are numbered from the
    beginning of the run, and step t is always in segment t // S. A checkpoint is a number of steps, which are flushed
    to the disk before it is published; resuming continues at that number. Segments that neither a checkpoint nor
    sampling needs are deleted.

    Within a segment, records are ordered ``[env, step]``, so a slice of one environment is one contiguous read and a
    batch ``[N, T]`` is N contiguous writes. Data are written into files that were allocated before, so a full disk
    raises an exception before any part of a batch can be sampled. The pages are page cache, not memory of the process.

    A checkpoint contains a checksum of every segment. Loading it verifies the segments, which reads them once, as
    loading a replay in memory does. Sampling verifies nothing.

    This is not a :class:`~torchrl.data.replay_buffers.Storage`, because a TorchRL writer chooses and reuses slots of a
    ring, and a storage is saved by copying it. This store avoids both.

    Args:
        folder (Path): folder of the files; created with the first batch.
        capacity (int): number of newest time steps that can be sampled.
        num_envs (int): ``N``.
        horizon (int): steps per slice.
        segment_steps (int, optional): ``S``. Defaults to ``None``: depends on the capacity, see
            :func:`pwm_torchrl.memory.storage.segment_steps`.
        since_checkpoint_steps (int): maximum number of time steps written since the oldest checkpoint kept, which need
            disk space in addition to the capacity. Defaults to ``0``.
    """

    def __init__(
        self,
        folder: Path,
        capacity: int,
        num_envs: int,
        horizon: int,
        segment_steps: int | None = None,
        since_checkpoint_steps: int = 0,
    ) -> None:
        self.folder = folder
        self.capacity = capacity
        self.num_envs = num_envs
        self.horizon = horizon
        self.since_checkpoint_steps = since_checkpoint_steps
        self._segment_steps = segment_steps
        self._reset()

    def _reset(self) -> None:
        self.steps = 0  # total number of time steps written
        self._writer: str | None = None  # name of the writer of the newest step
        self._begun = False  # whether this object has written
        self._protected: int | None = None  # steps at the oldest checkpoint kept, None if there is none
        self._journal: Journal | None = None
        self._files: SegmentFiles | None = None
        self._sums: dict[int, Checksum] = {}  # by segment; none for those of an earlier version

    @property
    def filled(self) -> int:
        """Number of time steps that can be sampled."""
        return min(self.steps, self.capacity)

    @property
    def oldest(self) -> int:
        """Number of the oldest time step that can be sampled."""
        return self.steps - self.filled

    def extend(self, batch: TensorDictBase) -> None:
        """Add a batch ``[N, T]``; if this fails, the store is unchanged.

        Raises:
            StorageFault: if it cannot be written.
            ConfigurationError: if its entries differ in shape or type from those of earlier steps.
        """
        layout = RecordLayout.of(batch)
        if self._journal is not None and layout != self._journal.layout:
            raise ConfigurationError(
                f"The replay in {self.folder} holds {self._journal.layout.describe()}; this batch has "
                f"{layout.describe()}."
            )
        if not self._begun:
            self._begin(layout)
        journal, files = self._opened()
        records = layout.pack(batch)
        segment = journal.segment_steps
        end = self.steps + batch.shape[1]
        touched = range(self.steps // segment, -(-end // segment))
        if not all(files.exists(number) for number in touched):
            self._remove_unreachable()
            for number in touched:
                files.create(number)
        for number in touched:
            files.write(number, self._pieces(records, number))
        if end // segment > self.steps // segment:
            # Flush the finished segment now, so that the next checkpoint has at most one segment to flush.
            files.sync()
        self._count(records, touched)
        self.steps = end
        files.close_before(self.oldest // segment)

    def _pieces(self, records: Tensor, number: int) -> Iterator[tuple[int, memoryview]]:
        """The part of a batch that belongs to a segment, as (offset in the segment, bytes) for each environment."""
        journal, _ = self._opened()
        size = journal.layout.record_bytes
        first = number * journal.segment_steps
        start = max(self.steps, first)
        stop = min(self.steps + records.shape[1], first + journal.segment_steps)
        for env, part in enumerate(records[:, start - self.steps : stop - self.steps]):
            yield (env * journal.segment_steps + start - first) * size, part.numpy().data.cast("B")

    def _count(self, records: Tensor, touched: Iterable[int]) -> None:
        """Update the checksums with a batch that was written."""
        journal, _ = self._opened()
        for number in touched:
            start = max(0, self.steps - number * journal.segment_steps)
            if start == 0 or number not in self._sums:
                self._sums[number] = Checksum(start, [0] * self.num_envs)
            for env, (_, data) in enumerate(self._pieces(records, number)):
                self._sums[number].add(env, data)

    def end_episodes(self) -> None:
        """Mark the newest step of every environment as the last of its episode.

        Raises:
            StorageFault: if it cannot be written.
        """
        if self.steps:
            self._write_done(torch.ones_like(self._newest_done()))

    def _newest_done(self) -> Tensor:
        """The flags ``[N, 1]`` of the newest step."""
        env = torch.arange(self.num_envs)
        return self.get(torch.full_like(env, self.steps - 1), env, 1)["next", "done"].squeeze(1)

    def _write_done(self, flags: Tensor) -> None:
        journal, files = self._opened()
        number, row = divmod(self.steps - 1, journal.segment_steps)
        size, start = journal.layout.record_bytes, journal.layout.fields["next", "done"].start
        rows = (env * journal.segment_steps + row for env in range(self.num_envs))
        files.write(number, [(each * size + start, flag.numpy().data.cast("B")) for each, flag in zip(rows, flags)])
        if number in self._sums:
            self._sums[number] = self._checksum(number, self._sums[number].first)

    def _checksum(self, number: int, first: int) -> Checksum:
        """The checksum of a segment on the disk, from its step ``first``."""
        journal, files = self._opened()
        size, segment = journal.layout.record_bytes, journal.segment_steps
        count = min(segment, self.steps - number * segment) - first
        parts = (((env * segment + first) * size, count * size) for env in range(self.num_envs))
        return Checksum(first, files.checksums(number, parts))

    def begin_at(self, step: int) -> None:
        """Start at a step, as if earlier steps had been written and deleted; for data from another storage."""
        self._reset()
        self.steps = step

    def _begin(self, layout: RecordLayout) -> None:
        """Register as a writer before the first batch; empties the folder unless a checkpoint was loaded."""
        self.require_space(layout.record_bytes)
        journal, files, first = self._journal, self._files, self.steps
        if journal is None or files is None:
            step_bytes = self.num_envs * layout.record_bytes
            size = self._segment_steps or segment_steps(self.capacity, step_bytes)
            journal = Journal(layout, self.num_envs, size)
            files = SegmentFiles(self.folder, journal.segment_bytes)
            files.remove(files.numbers())
            first = 0
        # Record the new writer before it overwrites any data.
        journal, writer = journal.with_writer(first)
        journal.save(self.folder)
        self._journal, self._files, self._writer, self._begun = journal, files, writer, True

    def _opened(self) -> tuple[Journal, SegmentFiles]:
        if self._journal is None or self._files is None:
            raise RuntimeError("The replay is empty.")
        return self._journal, self._files

    def require_space(self, record_bytes: int) -> None:
        """Check that the disk has enough space for the capacity and the steps between checkpoints.

        Args:
            record_bytes (int): bytes of one transition.

        Raises:
            StorageFault: if it has not.
        """
        step_bytes = self.num_envs * record_bytes
        segment = self._journal.segment_steps if self._journal else self._segment_steps
        needed = disk_bytes(self.capacity, step_bytes, self.since_checkpoint_steps, segment)
        held = held_bytes(self.folder)
        free = free_bytes(self.folder)
        if needed > held + free:
            more = f" more than the {amount(held)} that it has" if held else ""
            raise StorageFault(
                f"The replay in {self.folder} needs {amount(needed - held)}{more} (training.replay_capacity="
                f"{self.capacity * self.num_envs} transitions of {record_bytes} bytes, and "
                f"{self.since_checkpoint_steps} time steps between checkpoints), but only {amount(free)} are free; "
                "free space there, choose another run_dir, or lower training.replay_capacity."
            )

    def release(self, kept: int | None) -> None:
        """Delete segments that neither sampling nor a checkpoint needs.

        Args:
            kept (int, optional): time steps at the oldest checkpoint that can be resumed; ``None`` if there is none.
        """
        self._protected = kept
        self._remove_unreachable()

    def _remove_unreachable(self) -> None:
        if self._journal is None or self._files is None:
            return
        kept = self.steps if self._protected is None else min(self._protected, self.steps)
        reachable = max(0, kept - self.capacity) // self._journal.segment_steps
        self._files.discard(number for number in self._files.numbers() if number < reachable)
        self._sums = {number: each for number, each in self._sums.items() if number >= reachable}

    def slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        age, env = draw_starts(count, self.horizon, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, self.horizon)

    def observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        age, env = draw_starts(count, 1, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, 1).get("observation").squeeze(1)

    def get(self, time: Tensor, env: Tensor, length: int) -> TensorDict:
        """Read slices of consecutive steps.

        Args:
            time (Tensor): number of each slice's first step, int64 ``[B]``.
            env (Tensor): environment of each slice, int64 ``[B]``.
            length (int): steps per slice.

        Returns:
            TensorDict: ``[B, length]``, a copy.

        Raises:
            StorageFault: if a file is missing, short or cannot be read.
        """
        journal, files = self._opened()
        size, segment = journal.layout.record_bytes, journal.segment_steps
        # Split slices at segment boundaries: [B, 1] is broadcast against [maximum number of parts of a slice].
        time, env, row = (x.unsqueeze(1) for x in (time, env, torch.arange(len(time))))
        number = time // segment + torch.arange((length - 1) // segment + 2)
        start = torch.maximum(time, number * segment)
        stop = torch.minimum(time + length, (number + 1) * segment)
        offset = (env * segment + start - number * segment) * size
        place = (row * length + start - time) * size
        parts = torch.stack([number, offset, (stop - start) * size, place], -1)
        records = torch.empty(len(time), length, size, dtype=torch.uint8)
        files.read(parts[start < stop].tolist(), records.numpy().data.cast("B"))
        return journal.layout.unpack(records)

    def state_dict(self) -> dict[str, Any]:
        """The writer and the number of steps, after flushing them to the disk; the data are not copied.

        Raises:
            StorageFault: if they cannot be flushed.
        """
        if self._files is not None:
            self._files.sync()
        needed = self.oldest // self._journal.segment_steps if self._journal else 0
        sums = [(number, each.first, each.value) for number, each in self._sums.items() if number >= needed]
        return {
            "steps": self.steps,
            "envs": self.num_envs,
            "filled": self.filled,
            "writer": self._writer,
            # Saved because end_episodes may overwrite them later.
            "done": self._newest_done() if self.steps else None,
            # [segments, 3]: number, first step in it, checksum up to the newest step.
            "checksums": torch.tensor(sums, dtype=torch.int64).reshape(-1, 3),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, read_only: bool = False) -> None:
        """Continue from :meth:`state_dict`. Nothing is deleted until :meth:`release` is called.

        Args:
            state_dict (dict): the saved state.

        Keyword Args:
            read_only (bool): do not change the files, because they belong to a run that may still be active. If that
                run has called :meth:`end_episodes` after the checkpoint, the newest step is then also an episode's end
                here. Defaults to ``False``.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
            StorageFault: if its data no longer exist, or are damaged.
        """
        steps, envs, filled = state_dict["steps"], state_dict["envs"], state_dict["filled"]
        if not steps:
            self._reset()
            return
        refuse_other_shape(filled, envs, steps, self.num_envs, self.capacity)
        journal = Journal.load(self.folder)
        lost = "they do not exist" if journal is None else journal.overwritten(state_dict["writer"], steps)
        if journal is None or lost:
            raise StorageFault(
                f"The checkpoint needs steps {steps - filled} to {steps} of the replay in {self.folder}, but {lost}; "
                "resume from another checkpoint, or start the run again without resume."
            )
        files = SegmentFiles(self.folder, journal.segment_bytes)
        segment = journal.segment_steps
        for number in range((steps - filled) // segment, -(-steps // segment)):
            if not files.exists(number):
                raise StorageFault(files.missing(number))
        self._reset()
        self.steps, self._writer, self._protected = steps, state_dict["writer"], 0
        self._journal, self._files = journal, files
        sums = state_dict.get("checksums")
        if not torch.equal(self._newest_done(), state_dict["done"]):
            if not read_only:
                self._write_done(state_dict["done"])
            elif sums is not None:
                sums = sums[sums[:, 0] != (steps - 1) // segment]
        try:
            self._compare(sums)
        except StorageFault:
            self._reset()
            raise

    def _compare(self, saved: Tensor | None) -> None:
        """Compare the segments with a checkpoint's checksums; checkpoints of earlier versions have none.

        Raises:
            StorageFault: for the first damaged segment.
        """
        journal, files = self._opened()
        for number, first, value in [] if saved is None else saved.tolist():
            self._sums[number] = self._checksum(number, first)
            if self._sums[number].value != value:
                raise StorageFault(files.damaged(number))
        newest = (self.steps - 1) // journal.segment_steps
        if newest not in self._sums:  # written by an earlier version; new steps will be added to it
            self._sums[newest] = self._checksum(newest, 0)
