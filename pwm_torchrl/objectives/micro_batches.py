"""Updates split into micro-batches: gradients accumulate to those of the whole batch.

What couples the members of a batch is settled for the whole batch beforehand or afterwards: random numbers are drawn
first, means divide by counts of the whole batch, running statistics are updated once with all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


def micro_batches(count: int, size: int | None = None) -> Iterator[slice]:
    """Consecutive rows of at most ``size``; one slice of all of them if ``size`` is ``None``.

    No rows are one empty slice: a share of a batch may be empty, and its losses are then zeros like any other's.

    Raises:
        ValueError: if ``size`` is below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"A micro-batch of {size} rows is too small; the smallest is 1.")
    step = count if size is None else min(size, count)
    return (slice(first, min(first + step, count)) for first in range(0, max(1, count), max(1, step)))


def backward_in_parts(
    count: int, size: int | None, losses: Callable[[slice], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Back-propagate a batch's losses one micro-batch at a time.

    Args:
        count (int): rows of the batch.
        size (int, optional): rows per backward pass; ``None``: all at once.
        losses (callable): rows -> the micro-batch's share of each loss, so that the shares add up to the batch's loss.

    Returns:
        dict of Tensor: the batch's losses, detached. The gradients are added to the parameters' ``.grad``.
    """
    total: dict[str, Tensor] = {}
    for rows in micro_batches(count, size):
        parts = losses(rows)
        sum(parts.values()).backward()
        detached = {key: value.detach() for key, value in parts.items()}
        del parts  # or its graph would live beside the next micro-batch's
        total = {key: total[key] + value for key, value in detached.items()} if total else detached
    return total
