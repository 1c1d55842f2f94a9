"""The slope of a series that wanders, with an upper bound that does not pretend otherwise.

Fitted by least squares to the means of 20 equal blocks. The memory of a process is no series of independent
measurements: an allocator grows in rare steps, which a robust fit (Theil-Sen) would call outliers and a standard error
of independent residuals would not see. So the bound takes the worst case, a level that wanders: its slope is a weighted
mean of the 19 changes from block to block, taken as independent, and their scatter gives the standard error (Student's
t, 18 degrees of freedom; the variance of changes between means is enlarged by 3/2, since averaging over blocks hides
that share of a random walk).

On simulated random walks the bound holds in 95 of 100 cases; if all growth comes in 30 steps, in 92, in 4 steps, in 86;
where the level only fluctuates, it is wider than it need be.
"""

from __future__ import annotations

import math
from array import array

import torch

BLOCKS = 20
T_95 = 1.734  # Student's t, 18 degrees of freedom, one-sided 95 %


def slope(values: array | list[float]) -> tuple[float, float]:
    """Least-squares slope per value over the means of blocks, and its upper 95 % bound.

    Args:
        values: at equal distances; the remainder that does not fill the blocks is left out at the beginning.

    Raises:
        ValueError: if there are fewer values than blocks.
    """
    length = len(values) // BLOCKS
    if length < 1:
        raise ValueError(f"{len(values)} measured values are too few for a slope; at least {BLOCKS} are needed.")
    y = torch.tensor(values, dtype=torch.float64)[-BLOCKS * length :].view(BLOCKS, length).mean(1)
    changes = y.diff() / length
    # Least squares gives the change from block i to i + 1 a weight proportional to i (B - i).
    i = torch.arange(1, BLOCKS, dtype=torch.float64)
    weights = i * (BLOCKS - i)
    weights /= weights.sum()
    estimate = (weights * changes).sum()
    error = changes.std() * weights.norm() * math.sqrt(1.5)
    return estimate.item(), (estimate + T_95 * error).item()
