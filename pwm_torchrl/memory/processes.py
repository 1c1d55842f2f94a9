"""What the processes of a run hold, and what the machine has left, as Linux tells it in /proc.

A system without /proc (macOS) tells nothing of this: the readings are ``None`` there.

Sums over processes take each process's proportional share (Pss): a page that n processes have mapped counts 1/n in
each. Resident sizes would count shared memory once per worker, and, after a fork, the parent's memory too.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MachineMemory", "ProcessMemory", "TreeMemory", "descendants", "read_machine", "read_process", "read_tree"]

_ROOT = Path("/")


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes.

    Attributes:
        pid: the process.
        rss: resident memory, the sum of the next three.
        anon: anonymous memory: heaps and stacks. It can be reclaimed only by swapping.
        shmem: shared memory: tmpfs, /dev/shm, shared anonymous mappings. As ``anon``.
        file: mapped files: code, libraries, memory-mapped data. The kernel drops clean pages of it when it needs room.
        peak: the largest resident size so far, as the kernel noted it; not a share.
        virtual: size of the address space; not a share.
        proportional: whether the first four count pages shared between processes by their share.
    """

    pid: int
    rss: int
    anon: int
    shmem: int
    file: int
    peak: int
    virtual: int
    proportional: bool = False

    @property
    def own(self) -> int:
        """Memory that the kernel cannot take back: anonymous and shared."""
        return self.anon + self.shmem


@dataclass(frozen=True)
class TreeMemory:
    """Memory of a process and of its descendants, the workers."""

    main: ProcessMemory
    workers: tuple[ProcessMemory, ...] = ()

    @property
    def processes(self) -> tuple[ProcessMemory, ...]:
        """All of them, the main process first."""
        return (self.main, *self.workers)

    @property
    def rss(self) -> int:
        """Resident memory of all processes, in bytes."""
        return sum(process.rss for process in self.processes)

    @property
    def anon(self) -> int:
        """Anonymous memory of all processes, in bytes."""
        return sum(process.anon for process in self.processes)

    @property
    def shmem(self) -> int:
        """Shared memory of all processes, in bytes."""
        return sum(process.shmem for process in self.processes)

    @property
    def file(self) -> int:
        """Mapped files of all processes, in bytes."""
        return sum(process.file for process in self.processes)

    @property
    def own(self) -> int:
        """Memory that the kernel cannot take back: anonymous and shared, in bytes."""
        return self.anon + self.shmem


@dataclass(frozen=True)
class MachineMemory:
    """RAM of the machine in bytes: all of it, and what new allocations can have without swapping (MemAvailable)."""

    total: int
    available: int


def read_process(pid: int | None = None, *, proportional: bool = False, root: Path = _ROOT) -> ProcessMemory | None:
    """Memory of one process.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this one.
        proportional (bool, optional): count shared pages by share. It walks all pages of the process, about 10 ms per
            GiB, and is exact; the plain numbers cost nothing, and since Linux 6.2 may be off by some pages per CPU.
            Where the kernel refuses, or is too old to split the shares (Linux < 5.4), the plain numbers are given.
            Defaults to ``False``.
        root (Path, optional): where /proc is found. Defaults to ``/``.

    Returns:
        ProcessMemory | None: ``None`` if the process has ended, or if the system does not tell.
    """
    pid = os.getpid() if pid is None else pid
    directory = root / "proc" / str(pid)
    status = _kilobytes(_text(directory / "status"))
    if "RssAnon" not in status:  # ended, a zombie, or no such file here
        return None
    plain = {
        "rss": status["VmRSS"],
        "anon": status["RssAnon"],
        "shmem": status["RssShmem"],
        "file": status["RssFile"],
    }
    shares: dict[str, int] = {}
    if proportional:
        rollup = _kilobytes(_text(directory / "smaps_rollup"))
        names = {"rss": "Pss", "anon": "Pss_Anon", "shmem": "Pss_Shmem", "file": "Pss_File"}
        if all(name in rollup for name in names.values()):
            shares = {key: rollup[name] for key, name in names.items()}
    return ProcessMemory(
        pid, **(shares or plain), peak=status["VmHWM"], virtual=status["VmSize"], proportional=bool(shares)
    )


def descendants(pid: int | None = None, *, root: Path = _ROOT) -> list[int]:
    """Process ids of the children of a process, of their children, and so on; ascending.

    A process whose parent has ended belongs to init and is not found.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this one.
        root (Path, optional): where /proc is found. Defaults to ``/``.
    """
    children: dict[int, list[int]] = defaultdict(list)
    try:
        names = os.listdir(root / "proc")
    except FileNotFoundError:
        return []
    for name in filter(str.isdigit, names):
        # The name of the program stands in parentheses and may hold anything, spaces and parentheses too.
        fields = _text(root / "proc" / name / "stat").rpartition(")")[2].split()
        if fields:
            children[int(fields[1])].append(int(name))
    found: list[int] = []
    ahead = [os.getpid() if pid is None else pid]
    while ahead:
        generation = children.pop(ahead.pop(), [])
        found += generation
        ahead += generation
    return sorted(found)


def read_tree(pid: int | None = None, *, root: Path = _ROOT) -> TreeMemory | None:
    """Memory of a process and its descendants.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this one.
        root (Path, optional): where /proc is found. Defaults to ``/``.

    Returns:
        TreeMemory | None: ``None`` if the process has ended, or if the system does not tell. A worker that ends
        meanwhile is left out.
    """
    workers = descendants(pid, root=root)
    # One process alone shares nothing within the run, and its plain numbers cost nothing.
    main = read_process(pid, proportional=bool(workers), root=root)
    if main is None:
        return None
    readings = [read_process(worker, proportional=True, root=root) for worker in workers]
    # From a list: a tuple that a generator still fills breaks when another thread asks gc for all objects meanwhile.
    return TreeMemory(main, tuple([reading for reading in readings if reading is not None]))


def read_machine(root: Path = _ROOT) -> MachineMemory | None:
    """RAM of the machine, ``None`` where the system does not tell.

    Args:
        root (Path, optional): where /proc is found. Defaults to ``/``.
    """
    info = _kilobytes(_text(root / "proc" / "meminfo"))
    if "MemTotal" not in info or "MemAvailable" not in info:
        return None
    return MachineMemory(info["MemTotal"], info["MemAvailable"])


def _text(path: Path) -> str:
    """Content of a file in /proc; empty if its process has ended, or is hidden from us and so not ours."""
    try:
        # A program's name may be any bytes.
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _kilobytes(text: str) -> dict[str, int]:
    """The lines ``Name:  123 kB``, in bytes."""
    amounts = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            amounts[name] = int(words[0]) * 1024
    return amounts
