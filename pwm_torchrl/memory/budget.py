"""The run's memory budget and where it comes from.

A budget covers all processes of the run together, including what this process already holds. It counts memory that the
kernel cannot reclaim (anonymous and shared). Several limits apply at once; the smallest one is the budget, and all are
kept so that a plan can show them.
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
    """One limit, in bytes, with a description of its source."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Budget:
    """The smallest of several limits.

    Args:
        candidates (tuple of Candidate): all limits, at least one.

    Raises:
        ValueError: if there are no limits.
    """

    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("candidates=() is empty; a budget needs at least one limit")

    @property
    def binding(self) -> Candidate:
        """The smallest limit; the first one if several are equal."""
        return min(self.candidates, key=lambda candidate: candidate.bytes)

    @property
    def bytes(self) -> int:
        """The smallest limit in bytes; 0 if it is negative."""
        return max(self.binding.bytes, 0)

    @property
    def source(self) -> str:
        """Source of the smallest limit."""
        return self.binding.source


def host_budget(*, environ: Mapping[str, str] | None = None, root: Path = _ROOT) -> Budget:
    """RAM that this run can use on this machine.

    The limits are: each cgroup of this process, minus what other processes in it hold; SLURM's variables; a finite
    ``ulimit -v``; and free RAM, which is MemAvailable plus what this run already holds. On systems that do not report
    free RAM (macOS), the total RAM is used.

    ``ulimit -v`` limits the address space, of which code, libraries and reservations take more than they use. The limit
    used here is the remaining address space plus what the run already holds. The kernel applies it to each process;
    here it is applied to the whole run.

    Args:
        environ (Mapping, optional): environment variables. Defaults to ``None``, meaning ``os.environ``.
        root (Path, optional): root directory of /proc and the cgroup mounts. Defaults to ``/``.

    Raises:
        ValueError: if a SLURM variable is not a number.
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
        candidates.append(Candidate(total, "total RAM of this machine, which does not report how much is free"))
    return Budget(tuple(candidates))


def device_budget(gpu: str | None = None, *, device: int | str | None = None) -> Budget | None:
    """GPU memory that this run can use.

    Args:
        gpu (str, optional): a GPU type, see :func:`~pwm_torchrl.memory.readings.gpu_bytes`, for a plan for another
            machine. Defaults to ``None``, meaning this machine's device; this initializes CUDA in this process.
        device (int or str, optional): the device. Defaults to ``None``, meaning the current one.

    Returns:
        Budget | None: for a local device, its free memory plus what this process's allocator already holds; ``None``
        if no type is given and no device is usable.

    Raises:
        ValueError: for an unknown type.
    """
    if gpu is not None:
        total = format_bytes(gpu_bytes(gpu))
        source = f"{total} of a {gpu}, minus an estimate for the driver and a CUDA context; the device was not queried"
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
        # A smaller amount is noise: pages that are charged to the group but not mapped by any process.
        if others >= 16 * MIB:
            source += f", {format_bytes(group.limit)}, minus {format_bytes(others)} held by other processes in it"
        else:
            others = 0
        yield Candidate(group.limit - others, source)


def _slurm_bounds(environ: Mapping[str, str]) -> Iterator[Candidate]:
    """Limits from SLURM's variables, which are in MiB per node, or per CPU or GPU of the job on this node.

    Zero requests all memory of the node. A request per CPU or GPU without their number is srun's default outside of a
    job. Neither is a limit.
    """
    node = _slurm(environ, "SLURM_MEM_PER_NODE")
    if node:
        yield Candidate(node, "SLURM_MEM_PER_NODE")
    for unit, count_name in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        each, count = _slurm(environ, unit), _count(environ, count_name)
        if each and count:
            yield Candidate(each * count, f"{unit} {format_bytes(each)} times {count_name} {count}")


def _slurm(environ: Mapping[str, str], name: str) -> int:
    """Value of a variable in bytes, 0 if it is not set. A number without a unit is in MiB."""
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
    source = f"ulimit -v, {format_bytes(limit)} of addresses, minus {format_bytes(taken)} used for other mappings"
    yield Candidate(limit - taken, source)


def _of(total: int) -> str:
    return f"{format_bytes(total)} in total"
