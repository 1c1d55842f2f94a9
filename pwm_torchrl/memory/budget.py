"""How much memory a run may have, and who says so.

A budget is the memory of all processes of the run together, what this process holds already included, and counts what
the kernel cannot take back (anonymous and shared memory). Several things bound it; the smallest binds, and all are kept
so that a plan can show them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.memory.cgroups import memory_cgroups
from pwm_torchrl.memory.readings import (
    MIB,
    TreeMemory,
    format_bytes,
    gpu_bytes,
    parse_bytes,
    read_machine,
    read_tree,
    usable_gpu_bytes,
)

__all__ = ["Budget", "Candidate", "device_budget", "host_budget"]

_ROOT = Path("/")


@dataclass(frozen=True)
class Candidate:
    """One bound: bytes, and in words where it comes from."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Budget:
    """The tightest of several bounds.

    Args:
        candidates (tuple of Candidate): all bounds, at least one.

    Raises:
        ValueError: without a bound.
    """

    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("a budget needs at least one bound")

    @property
    def binding(self) -> Candidate:
        """The smallest bound, the first of equals."""
        return min(self.candidates, key=lambda candidate: candidate.bytes)

    @property
    def bytes(self) -> int:
        """Bytes of the smallest bound, not negative."""
        return max(self.binding.bytes, 0)

    @property
    def source(self) -> str:
        """Where the smallest bound comes from."""
        return self.binding.source


def host_budget(*, environ: Mapping[str, str] | None = None, root: Path = _ROOT) -> Budget:
    """RAM that this run may have here.

    The bounds: the limit of each cgroup this process is in, less what others hold in it; SLURM's variables; a finite
    ``ulimit -v``; free RAM, which is MemAvailable and what this run holds already. Where free RAM is not told (macOS),
    it is all RAM of the machine.

    ``ulimit -v`` bounds addresses, of which code, libraries and reservations take more than they use; the bound is what
    is left of them, and what the run holds already. It holds for each process, and is applied to the run.

    Args:
        environ (Mapping, optional): where SLURM's variables are looked up. Defaults to ``None``, ``os.environ``.
        root (Path, optional): where /proc and cgroups are found. Defaults to ``/``.

    Raises:
        ValueError: for a variable of SLURM that is not a number.
    """
    tree = read_tree(root=root)
    own = 0 if tree is None else tree.own
    candidates = [
        *_cgroup_bounds(own, root),
        *_slurm_bounds(os.environ if environ is None else environ),
        *_address_space_bound(tree),
    ]
    machine = read_machine(root)
    if machine is not None:
        candidates.append(Candidate(own + machine.available, f"free RAM of this machine ({_of(machine.total)})"))
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        candidates.append(Candidate(total, "all RAM of this machine, which does not tell how much is free"))
    return Budget(tuple(candidates))


def device_budget(gpu: str | None = None, *, device: int | str | None = None) -> Budget | None:
    """GPU memory that this run may have.

    Args:
        gpu (str, optional): a type of GPU, as in :func:`~pwm_torchrl.memory.readings.gpu_bytes`, for a plan made
            elsewhere. Defaults to ``None``, the device of this machine, which initializes CUDA in this process.
        device (int or str, optional): the device. Defaults to ``None``, the current one.

    Returns:
        Budget | None: ``None`` without a type and without a usable device. Of a device that is here: what is free, and
        what this process's allocator holds already.

    Raises:
        ValueError: for a type that is not known.
    """
    if gpu is not None:
        total = format_bytes(gpu_bytes(gpu))
        source = f"a {gpu} has {total}, less the driver's and a CUDA context's share; not asked of the device"
        return Budget((Candidate(usable_gpu_bytes(gpu), source),))
    import torch

    if not torch.cuda.is_available():
        return None
    free, total_bytes = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    source = f"free memory of {name} ({_of(total_bytes)})"
    return Budget((Candidate(free + torch.cuda.memory_reserved(device), source),))


def _cgroup_bounds(own: int, root: Path) -> Iterator[Candidate]:
    for group in memory_cgroups(root):
        if group.limit is None:
            continue
        source = f"limit of cgroup {group.name} ({group.limit_file})"
        others = max((group.held or 0) - own, 0)
        # Less than this is noise: pages that are charged to the group and mapped by nobody.
        if others >= 16 * MIB:
            source += f", {format_bytes(group.limit)}, less {format_bytes(others)} that others in it hold"
        else:
            others = 0
        yield Candidate(group.limit - others, source)


def _slurm_bounds(environ: Mapping[str, str]) -> Iterator[Candidate]:
    """SLURM gives MiB: per node, or per CPU or GPU of the job on this node.

    Zero asks for all memory of the node, and a request per CPU or GPU whose number is not told is a default of srun
    outside of a job: neither bounds anything here.
    """
    node = _slurm(environ, "SLURM_MEM_PER_NODE")
    if node:
        yield Candidate(node, "SLURM_MEM_PER_NODE")
    for unit, count_name in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        each, count = _slurm(environ, unit), _count(environ, count_name)
        if each and count:
            yield Candidate(each * count, f"{unit} {format_bytes(each)} times {count_name} {count}")


def _slurm(environ: Mapping[str, str], name: str) -> int:
    """Bytes of a variable in MiB, or with a unit of its own; 0 if it is not set."""
    text = environ.get(name, "").strip()
    if not text:
        return 0
    try:
        return int(text) * MIB if text.isdigit() else parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} is not an amount of memory in MiB; correct or unset it") from error


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip()
    if text and not text.isdigit():
        raise ValueError(f"{name}={text!r} is not a number; correct or unset it")
    return int(text or 0)


def _address_space_bound(tree: TreeMemory | None) -> Iterator[Candidate]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    taken = 0 if tree is None else tree.main.virtual - tree.main.own
    source = f"ulimit -v, {format_bytes(limit)} of addresses, less {format_bytes(taken)} that hold no such memory"
    yield Candidate(limit - taken, source)


def _of(total: int) -> str:
    return f"{format_bytes(total)} in all"
