"""A checkpoint of a replay on disk continued in RAM, and the other way round: the same steps in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase

from pwm_torchrl.data.layout import refuse_other_shape
from pwm_torchrl.data.ring import RingStore, state_slots
from pwm_torchrl.data.segments import SegmentStore

#: Time steps that are moved at once.
PART = 1024


def slot_order(steps: int, capacity: int) -> list[tuple[int, int]]:
    """The steps that a ring holds, as ranges (first, last + 1) in the order of its slots."""
    oldest = max(0, steps - capacity)
    # Step t lies in slot t % capacity; the first step of slot 0 is the seam.
    seam = -(-oldest // capacity) * capacity
    return [part for part in ((seam, steps), (oldest, min(seam, steps))) if part[0] < part[1]]


def in_parts(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) cut into such that hold :data:`PART` steps at most."""
    for first, last in ranges:
        for start in range(first, last, PART):
            yield start, min(start + PART, last)


def disk_to_ring(source: SegmentStore, ring: RingStore) -> None:
    """Fill a ring with what a store on disk holds."""
    env = torch.arange(source.num_envs)

    def slots() -> Iterator[TensorDictBase]:
        for first, last in in_parts(slot_order(source.steps, source.capacity)):
            yield source.get(torch.full_like(env, first), env, last - first).transpose(0, 1).to(ring.device)

    ring.fill(source.steps, slots())


def ring_to_disk(state_dict: dict[str, Any], store: SegmentStore) -> None:
    """Fill a store on disk with the state of a ring.

    Raises:
        ConfigurationError: if the state has another number of environments or another capacity.
        StorageFault: if the disk does not take it.
    """
    data, steps = state_dict["data"], state_dict["steps"]
    filled, envs = data["action"].shape[:2] if data else (0, store.num_envs)
    refuse_other_shape(filled, envs, steps, store.num_envs, store.capacity)
    store.begin_at(steps - filled)
    for first, last in in_parts(slot_order(steps, filled)[::-1] if data else []):
        slot = first % filled
        store.extend(state_slots(data, slot, slot + last - first).transpose(0, 1))
