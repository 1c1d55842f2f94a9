"""One look at all of a run's memory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.memory.cgroups import CgroupMemory, memory_cgroups, tightest
from pwm_torchrl.memory.processes import MachineMemory, TreeMemory, read_machine, read_tree

__all__ = ["GpuMemory", "Reading", "read_gpu", "read_memory"]

_ROOT = Path("/")


@dataclass(frozen=True)
class GpuMemory:
    """What PyTorch's allocator holds on the GPUs of this process, in bytes, and how often it was short of memory.

    Attributes:
        allocated: held by tensors.
        reserved: held by the allocator, for tensors or for reuse.
        peak_allocated: the most ever allocated, since PyTorch's peaks were last reset.
        peak_reserved: the most ever reserved, likewise.
        alloc_retries: allocations that succeeded only after cached blocks were released.
        ooms: out-of-memory errors, recovered ones included.
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    alloc_retries: int
    ooms: int


@dataclass(frozen=True)
class Reading:
    """A run's memory at one time. What the system does not tell is ``None``, or empty.

    Attributes:
        time: seconds, of ``time.monotonic``.
        processes: the run's processes.
        cgroups: groups of the main process, the innermost first.
        machine: RAM of the machine.
        gpu: memory of PyTorch's CUDA allocator, once CUDA is in use in this process.
    """

    time: float
    processes: TreeMemory | None = None
    cgroups: tuple[CgroupMemory, ...] = ()
    machine: MachineMemory | None = None
    gpu: GpuMemory | None = None

    @property
    def limits(self) -> tuple[CgroupMemory, ...]:
        """Groups whose limit can be reached: one as large as the machine's RAM is none."""
        most = self.machine.total if self.machine is not None else None
        return tuple(
            [group for group in self.cgroups if group.limit is not None and (most is None or group.limit < most)]
        )

    def metrics(self) -> dict[str, int]:
        """Numbers to log, in bytes where nothing else is said; what is not known is absent.

        ``memory/``: ``rss``, ``anon``, ``shmem``, ``file`` and ``own`` (anonymous and shared) of all processes of the
        run, ``processes`` (their number), ``main_peak_rss`` (as the kernel noted it), ``available`` (RAM); of the
        cgroup with the smallest limit, or of the innermost one: ``cgroup_usage``, ``cgroup_limit``,
        ``cgroup_unreclaimable``, ``cgroup_unwritten``; and ``gpu_allocated``, ``gpu_reserved``, ``gpu_peak_allocated``,
        ``gpu_peak_reserved``, ``gpu_alloc_retries`` and ``gpu_ooms`` (counts).
        """
        numbers: dict[str, int | None] = {}
        if self.processes is not None:
            numbers.update({kind: getattr(self.processes, kind) for kind in ("rss", "anon", "shmem", "file", "own")})
            numbers["processes"] = len(self.processes.processes)
            numbers["main_peak_rss"] = self.processes.main.peak
        if self.machine is not None:
            numbers["available"] = self.machine.available
        if self.cgroups:
            group = tightest(self.limits) or self.cgroups[0]
            numbers["cgroup_usage"] = group.usage
            numbers["cgroup_limit"] = group.limit
            numbers["cgroup_unreclaimable"] = group.unreclaimable
            numbers["cgroup_unwritten"] = group.unwritten
        if self.gpu is not None:
            numbers.update({f"gpu_{kind}": number for kind, number in vars(self.gpu).items()})
        return {f"memory/{name}": number for name, number in numbers.items() if number is not None}


def read_memory(pid: int | None = None, *, root: Path = _ROOT) -> Reading:
    """Look at all memory now.

    Args:
        pid (int, optional): main process of the run. Defaults to ``None``, this one. Cgroups and GPU memory are always
            those of this process.
        root (Path, optional): where /proc and cgroups are found. Defaults to ``/``.
    """
    return Reading(
        time=time.monotonic(),
        processes=read_tree(pid, root=root),
        cgroups=memory_cgroups(root),
        machine=read_machine(root),
        gpu=read_gpu(),
    )


def read_gpu() -> GpuMemory | None:
    """What PyTorch's CUDA allocator holds on all devices of this process.

    ``None`` until this process uses CUDA: neither torch is imported nor CUDA initialized for it.
    """
    torch = sys.modules.get("torch")
    # While another thread imports torch, it is there without its parts.
    cuda = getattr(torch, "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    if cuda is None or is_initialized is None or not is_initialized():
        return None
    stats = [cuda.memory_stats(device) for device in range(cuda.device_count())]

    def total(name: str) -> int:
        return sum(int(stat.get(name, 0)) for stat in stats)

    return GpuMemory(
        allocated=total("allocated_bytes.all.current"),
        reserved=total("reserved_bytes.all.current"),
        peak_allocated=total("allocated_bytes.all.peak"),
        peak_reserved=total("reserved_bytes.all.peak"),
        alloc_retries=total("num_alloc_retries"),
        ooms=total("num_ooms"),
    )
