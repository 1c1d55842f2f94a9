"""CPU threads of a run."""

from __future__ import annotations

import os

import torch


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, which containers set, and what SLURM gave to its task.

    SLURM need not bind a task to its CPUs. More threads than CPUs wait for each other: two threads beside a busy
    process on two cores took 11 times as long as one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(count, int(given)) if given.isdigit() and int(given) > 0 else count


def set_threads(threads: int | None) -> int:
    """Use ``threads`` for tensor operations, or as many as there are CPUs; returns the number.

    torchrun starts its ranks with the same CPUs, which they share; SLURM gives each task its own.
    """
    count = threads or max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(count)
    return count
