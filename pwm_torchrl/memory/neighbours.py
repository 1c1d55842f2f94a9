"""The plans next to one that was made: what a little more memory would buy, and what can still be saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pwm_torchrl.memory.predict import Choices
from pwm_torchrl.memory.space import EFFICIENT, PlanSpace

_WHERE = {"device": "the replay on the GPU", "memory": "the replay in host memory", "disk": "the replay on disk"}


@dataclass(frozen=True)
class Alternative:
    """Another plan: what differs, and what it would need where the networks are."""

    change: str
    bytes: int


def larger_plan(space: PlanSpace, choices: Choices) -> Alternative | None:
    """One step back towards the fastest way; ``None`` if there is none that needs more."""
    needed = space.needed(choices)
    found = (Alternative(change, space.needed(other)) for other, change in _larger(space, choices))
    return next((other for other in found if other.bytes > needed), None)


def cheaper_plan(space: PlanSpace, choices: Choices) -> Alternative | None:
    """One step further, the fastest of those that need less; ``None`` if there is none."""
    needed = space.needed(choices)
    found = (Alternative(change, space.needed(other)) for other, change in _cheaper(space, choices))
    return next((other for other in found if other.bytes < needed), None)


def _larger(space: PlanSpace, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """The update that is split the most in larger parts, then substeps kept, then a nearer replay."""
    sizes = {update: choices.micro_batch(update) for update in space.updates if space.free(update)}
    split = {update: size for update, size in sizes.items() if size is not None and size < space.batch(update)}
    for update in sorted(split, key=lambda update: -space.batch(update) / split[update]):
        size = split[update]
        while size < space.batch(update):
            size = min(2 * size, space.batch(update))
            whole = size == space.batch(update)
            how = "at once" if whole else f"in micro-batches of {size}"
            yield choices.split(update, None if whole else size), f"the {update} update {how}"
    if choices.checkpoint_substeps and False in space.recomputes:
        yield replace(choices, checkpoint_substeps=False), "substeps kept instead of recomputed"
    for storage in reversed(space.storages[: _place(space, choices)]):
        yield replace(choices, replay_storage=storage), _WHERE[storage]


def _cheaper(space: PlanSpace, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """A replay farther away, the update at the peak in smaller parts, recomputed substeps, still smaller parts."""
    for storage in space.storages[_place(space, choices) + 1 :]:
        yield replace(choices, replay_storage=storage), _WHERE[storage]
    update = max(space.updates, key=lambda update: space.taken(update, choices).peak)
    size = min(choices.micro_batch(update) or space.batch(update), space.batch(update))
    half = -(-size // 2)
    smaller = choices.split(update, half), f"the {update} update in micro-batches of {half}"
    can_halve = space.free(update) and size > 1
    if can_halve and half >= EFFICIENT[update]:
        yield smaller
    if not choices.checkpoint_substeps and True in space.recomputes:
        yield replace(choices, checkpoint_substeps=True), "substeps recomputed in the backward pass"
    if can_halve:
        yield smaller


def _place(space: PlanSpace, choices: Choices) -> int:
    return space.storages.index(choices.replay_storage)
