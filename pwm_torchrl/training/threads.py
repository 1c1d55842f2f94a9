"""CPU threads of a run."""

from __future__ import annotations

import os

import torch


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, which SLURM and containers set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None) -> int:
    """Use ``threads`` for tensor operations, or as many as there are CPUs; returns the number."""
    count = threads or available_cpus()
    torch.set_num_threads(count)
    return count
