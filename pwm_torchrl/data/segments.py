"""Replay on disk: an append-only store of segments, of which sampling sees the newest steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.data.files import amount, free_bytes
from pwm_torchrl.data.journal import Journal
from pwm_torchrl.data.layout import RecordLayout, refuse_other_shape
from pwm_torchrl.data.sampler import draw_starts
from pwm_torchrl.data.segment_files import SegmentFiles, held_bytes
from pwm_torchrl.data.sizes import disk_bytes, segment_steps
from pwm_torchrl.errors import ConfigurationError, StorageFault


class SegmentStore:
    """Steps of N environments in files that are written once.

    A ring on disk would overwrite what the last checkpoint refers to. Here time steps are numbered from the beginning
    of the run and step t always lies in segment t // S: a checkpoint is a number of steps, all of them on the disk
    before it is published, and to resume is to go on at that number. Segments that no checkpoint and no sample can
    reach any more are deleted as a whole.

    In a segment, records lie as ``[env, step]``, so that a slice of one environment is one contiguous read and a batch
    ``[N, T]`` is N contiguous writes. Data pass through file calls into room that was allocated before: a full disk is
    an exception, before anything of a batch can be sampled. The kernel caches pages as it has room; the process holds
    none of them.

    It is no :class:`~torchrl.data.replay_buffers.Storage`: those are addressed by slots of a ring that a writer chooses
    and reuses, and saved by copying, which are the two things that this store is there to avoid.

    Args:
        folder (Path): of the files; made when the first batch comes.
        capacity (int): newest time steps that sampling sees.
        num_envs (int): ``N``.
        horizon (int): steps per slice.
        segment_steps (int, optional): ``S``. Defaults to ``None``: by the capacity, see
            :func:`pwm_torchrl.data.sizes.segment_steps`.
        since_checkpoint_steps (int): most time steps written since the oldest checkpoint kept; what room is asked for
            beside the capacity. Defaults to ``0``.
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
        self.steps = 0  # time steps ever written
        self._writer: str | None = None  # who wrote the newest of them
        self._begun = False  # whether this object has written
        self._protected: int | None = None  # steps at the oldest checkpoint kept, None without one
        self._journal: Journal | None = None
        self._files: SegmentFiles | None = None

    @property
    def filled(self) -> int:
        """Time steps that can be sampled."""
        return min(self.steps, self.capacity)

    @property
    def oldest(self) -> int:
        """Number of the oldest time step that can be sampled."""
        return self.steps - self.filled

    def extend(self, batch: TensorDictBase) -> None:
        """Add a batch ``[N, T]``; if that fails, the store is as before.

        Raises:
            StorageFault: if it cannot be written.
            ConfigurationError: if its entries are not those of the steps before.
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
            # A finished segment goes to the disk now, so that no more than one is left for the next checkpoint.
            files.sync()
        self.steps = end
        files.close_before(self.oldest // segment)

    def _pieces(self, records: Tensor, number: int) -> Iterator[tuple[int, memoryview]]:
        """Where the part of a batch that belongs to a segment lies in it: (offset, bytes) of each environment."""
        journal, _ = self._opened()
        size = journal.layout.record_bytes
        first = number * journal.segment_steps
        start = max(self.steps, first)
        stop = min(self.steps + records.shape[1], first + journal.segment_steps)
        for env, part in enumerate(records[:, start - self.steps : stop - self.steps]):
            yield (env * journal.segment_steps + start - first) * size, part.numpy().data.cast("B")

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

    def begin_at(self, step: int) -> None:
        """Go on at a step as if those before had been written and lost; for data that come from elsewhere."""
        self._reset()
        self.steps = step

    def _begin(self, layout: RecordLayout) -> None:
        """Before the first batch: become the writer, in an empty folder unless a checkpoint was loaded."""
        self.require_space(layout.record_bytes)
        journal, files, first = self._journal, self._files, self.steps
        if journal is None or files is None:
            step_bytes = self.num_envs * layout.record_bytes
            size = self._segment_steps or segment_steps(self.capacity, step_bytes)
            journal = Journal(layout, self.num_envs, size)
            files = SegmentFiles(self.folder, journal.segment_bytes)
            files.remove(files.numbers())
            first = 0
        # Before anything is written over, the files are known to be another writer's from this step on.
        journal, writer = journal.begun(first)
        journal.save(self.folder)
        self._journal, self._files, self._writer, self._begun = journal, files, writer, True

    def _opened(self) -> tuple[Journal, SegmentFiles]:
        if self._journal is None or self._files is None:
            raise RuntimeError("The replay is empty.")
        return self._journal, self._files

    def require_space(self, record_bytes: int) -> None:
        """Refuse to begin what will not fit.

        Args:
            record_bytes (int): bytes of one transition.

        Raises:
            StorageFault: if the disk has less room than capacity and checkpoints need.
        """
        step_bytes = self.num_envs * record_bytes
        segment = self._journal.segment_steps if self._journal else self._segment_steps
        needed = disk_bytes(self.capacity, step_bytes, self.since_checkpoint_steps, segment)
        held = held_bytes(self.folder)
        free = free_bytes(self.folder)
        if needed > held + free:
            there = f" besides the {amount(held)} that it has" if held else ""
            raise StorageFault(
                f"The replay in {self.folder} needs {amount(needed - held)}{there} (training.replay_capacity="
                f"{self.capacity * self.num_envs} transitions of {record_bytes} bytes, and "
                f"{self.since_checkpoint_steps} time steps between checkpoints), and {amount(free)} are free; free "
                "space there, choose another run_dir, or lower training.replay_capacity."
            )

    def release(self, kept: int | None) -> None:
        """Delete segments that neither sampling nor a checkpoint needs.

        Args:
            kept (int, optional): time steps at the oldest checkpoint from which the run may be resumed; ``None`` if
                there is none.

        Raises:
            StorageFault: if a file cannot be deleted.
        """
        self._protected = kept
        self._remove_unreachable()

    def _remove_unreachable(self) -> None:
        if self._journal is None or self._files is None:
            return
        kept = self.steps if self._protected is None else min(self._protected, self.steps)
        reachable = max(0, kept - self.capacity) // self._journal.segment_steps
        self._files.remove(number for number in self._files.numbers() if number < reachable)

    def slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``, uniform over all starts."""
        age, env = draw_starts(count, self.horizon, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, self.horizon)

    def observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all steps."""
        age, env = draw_starts(count, 1, self.filled, self.num_envs)
        return self.get(self.oldest + age, env, 1).get("observation").squeeze(1)

    def get(self, time: Tensor, env: Tensor, length: int) -> TensorDict:
        """Slices of consecutive steps.

        Args:
            time (Tensor): numbers of their first steps, int64 ``[B]``.
            env (Tensor): their environments, int64 ``[B]``.
            length (int): steps of each.

        Returns:
            TensorDict: ``[B, length]``, a copy.

        Raises:
            StorageFault: if a file is missing, short or cannot be read.
        """
        journal, files = self._opened()
        size, segment = journal.layout.record_bytes, journal.segment_steps
        # A slice is cut where segments meet; [B, 1] against [most parts of one slice].
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
        """Whose steps there are and how many, after they have reached the disk; the data stay where they are.

        Raises:
            StorageFault: if they do not get there.
        """
        if self._files is not None:
            self._files.sync()
        return {
            "steps": self.steps,
            "envs": self.num_envs,
            "filled": self.filled,
            "writer": self._writer,
            # The only numbers that are written over, by end_episodes.
            "done": self._newest_done() if self.steps else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Nothing is deleted until :meth:`release` is called.

        Raises:
            ConfigurationError: if the checkpoint has another number of environments or another capacity.
            StorageFault: if its data are not there any more.
        """
        steps, envs, filled = state_dict["steps"], state_dict["envs"], state_dict["filled"]
        if not steps:
            self._reset()
            return
        refuse_other_shape(filled, envs, steps, self.num_envs, self.capacity)
        journal = Journal.load(self.folder)
        lost = "they are not there" if journal is None else journal.written_over(state_dict["writer"], steps)
        if journal is None or lost:
            raise StorageFault(
                f"The checkpoint needs steps {steps - filled} to {steps} of the replay in {self.folder}, and {lost}; "
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
        if not torch.equal(self._newest_done(), state_dict["done"]):
            self._write_done(state_dict["done"])
