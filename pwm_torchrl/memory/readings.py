"""Memory of this process and its children, of its cgroups, of the machine and of GPUs. All amounts are in bytes."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.memory.cgroups import CgroupMemory, memory_cgroups, tightest

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "TIB",
    "GpuMemory",
    "MachineMemory",
    "ProcessMemory",
    "Reading",
    "TreeMemory",
    "descendants",
    "format_bytes",
    "gpu_bytes",
    "gpu_names",
    "parse_bytes",
    "read_gpu",
    "read_machine",
    "read_memory",
    "read_process",
    "read_tree",
    "usable_gpu_bytes",
]

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_LETTERS = "KMGTP"
_QUANTITY = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<letter>[kmgtp]?)(?P<kind>i?b?)\s*", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """Format an amount with three digits and a binary unit: ``1.5 GiB``, ``400 MiB``, ``12 B``.

    Args:
        count (float): bytes; a difference may be negative.
    """
    value, unit = abs(float(count)), "B"
    for letter in _LETTERS:
        # 1023.7 would be printed as 1024.
        if round(value) < 1024:
            break
        value, unit = value / 1024, f"{letter}iB"
    digits = 0 if value >= 100 or unit == "B" else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    if digits:
        text = text.rstrip("0").rstrip(".")
    return f"{'-' if count < 0 and text != '0' else ''}{text} {unit}"


def parse_bytes(quantity: str | int) -> int:
    """Parse an amount: ``"1.5 GiB"``, ``"64G"`` (binary), ``"48 GB"`` (decimal), ``"1024"`` or an integer (bytes).

    Args:
        quantity (str or int): the amount, not negative.

    Raises:
        ValueError: if it is not an amount of memory.
    """
    if isinstance(quantity, int) and not isinstance(quantity, bool) and quantity >= 0:
        return quantity
    match = _QUANTITY.fullmatch(quantity) if isinstance(quantity, str) else None
    if match is None:
        raise ValueError(f"{quantity!r} is not an amount of memory; write bytes, '1.5 GiB', '64G' or '48 GB'")
    power = " KMGTP".index(match["letter"].upper() or " ")
    base = 1000 if match["kind"].lower() == "b" else 1024
    return round(float(match["number"]) * base**power)


_ROOT = Path("/")


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes.

    Attributes:
        pid: the process.
        rss: resident memory, the sum of the next three.
        anon: anonymous memory: heaps and stacks. It can be reclaimed only by swapping.
        shmem: shared memory: tmpfs, /dev/shm, shared anonymous mappings. As ``anon``.
        file: mapped files: code, libraries, memory-mapped data. The kernel drops clean pages when memory is needed.
        peak: the largest resident size so far, as recorded by the kernel; never proportional.
        virtual: size of the address space; never proportional.
        proportional: whether ``rss``, ``anon``, ``shmem`` and ``file`` divide a shared page by the number of processes
            that map it.
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
        """Memory that the kernel cannot reclaim: anonymous and shared."""
        return self.anon + self.shmem


@dataclass(frozen=True)
class TreeMemory:
    """Memory of a process and its descendants (worker processes)."""

    main: ProcessMemory
    workers: tuple[ProcessMemory, ...] = ()

    @property
    def processes(self) -> tuple[ProcessMemory, ...]:
        """All processes, the main process first."""
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
        """Memory that the kernel cannot reclaim: anonymous and shared, in bytes."""
        return self.anon + self.shmem


@dataclass(frozen=True)
class MachineMemory:
    """RAM of the machine in bytes: the total, and the part available without swapping (MemAvailable)."""

    total: int
    available: int


def read_process(pid: int | None = None, *, proportional: bool = False, root: Path = _ROOT) -> ProcessMemory | None:
    """Memory of one process.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this process.
        proportional (bool, optional): divide shared pages by the number of processes that map them. This is exact but
            walks all pages of the process, which takes about 10 ms per GiB. The plain numbers are immediate, but since
            Linux 6.2 they may be off by some pages per CPU. If the kernel denies access or is older than 5.4, the plain
            numbers are returned. Defaults to ``False``.
        root (Path, optional): root directory of /proc. Defaults to ``/``.

    Returns:
        ProcessMemory | None: ``None`` if the process has ended or the system has no /proc.
    """
    pid = os.getpid() if pid is None else pid
    directory = root / "proc" / str(pid)
    status = _kilobytes(_text(directory / "status"))
    if "RssAnon" not in status:  # the process has ended, is a zombie, or there is no /proc
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
    """Process ids of all descendants of a process, in ascending order.

    A process whose parent has ended belongs to init and is not found.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this process.
        root (Path, optional): root directory of /proc. Defaults to ``/``.
    """
    children: dict[int, list[int]] = defaultdict(list)
    try:
        names = os.listdir(root / "proc")
    except FileNotFoundError:
        return []
    for name in filter(str.isdigit, names):
        # The program's name is in parentheses and may itself contain spaces and parentheses.
        fields = _text(root / "proc" / name / "stat").rpartition(")")[2].split()
        if fields:
            children[int(fields[1])].append(int(name))
    found: list[int] = []
    pending = [os.getpid() if pid is None else pid]
    while pending:
        generation = children.pop(pending.pop(), [])
        found += generation
        pending += generation
    return sorted(found)


def read_tree(pid: int | None = None, *, root: Path = _ROOT) -> TreeMemory | None:
    """Memory of a process and its descendants.

    Args:
        pid (int, optional): the process. Defaults to ``None``, this process.
        root (Path, optional): root directory of /proc. Defaults to ``/``.

    Returns:
        TreeMemory | None: ``None`` if the process has ended or the system has no /proc. A worker that ends during the
        call is left out.
    """
    workers = descendants(pid, root=root)
    # A single process shares no pages within the run, so the plain numbers are right and faster.
    main = read_process(pid, proportional=bool(workers), root=root)
    if main is None:
        return None
    readings = [read_process(worker, proportional=True, root=root) for worker in workers]
    # Built from a list: a tuple being filled from a generator breaks if another thread calls gc.get_objects() then.
    return TreeMemory(main, tuple([reading for reading in readings if reading is not None]))


def read_machine(root: Path = _ROOT) -> MachineMemory | None:
    """RAM of the machine; ``None`` if the system has no /proc/meminfo.

    Args:
        root (Path, optional): root directory of /proc. Defaults to ``/``.
    """
    info = _kilobytes(_text(root / "proc" / "meminfo"))
    if "MemTotal" not in info or "MemAvailable" not in info:
        return None
    return MachineMemory(info["MemTotal"], info["MemAvailable"])


def _text(path: Path) -> str:
    """Content of a file in /proc; empty if its process has ended or belongs to another user."""
    try:
        # A program's name may contain arbitrary bytes.
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _kilobytes(text: str) -> dict[str, int]:
    """Parse the lines ``Name:  123 kB``; values in bytes."""
    amounts = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            amounts[name] = int(words[0]) * 1024
    return amounts


# Type -> {nominal GB: total in MiB as reported by nvidia-smi}, the smallest size first. If the total depends on ECC,
# the smaller one is listed.
_GPUS: dict[str, dict[int, int]] = {
    "a10": {24: 23028},
    "a10g": {24: 23028},
    "a40": {48: 46068},
    "a100": {40: 40960, 80: 81920},
    "a6000": {48: 49140},
    "b200": {180: 183359},
    "gh200": {96: 97871},
    "h100": {80: 81559, 94: 95830},
    "h200": {141: 143771},
    "l4": {24: 23034},
    "l40": {48: 46068},
    "l40s": {48: 46068},
    "t4": {16: 15360},
    "v100": {16: 16384, 32: 32768},
    "2080ti": {11: 11264},
    "3090": {24: 24576},
    "4090": {24: 24564},
    "5090": {32: 32607},
    "6000ada": {48: 46068},
    "8000": {48: 46080},
}

# Words that are ignored in names such as "Tesla V100-SXM2-32GB", "nvidia_h100_80gb_hbm3", "quadro_rtx_8000".
_NOISE = {"nvidia", "tesla", "geforce", "quadro", "rtx", "gpu", "generation", "pcie", "pcie4", "hbm2", "hbm2e", "hbm3",
          "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "nvl"}  # fmt: skip


def gpu_names() -> list[str]:
    """Names that :func:`gpu_bytes` accepts; a type with several sizes is listed once per size (``a100-40gb``)."""
    return [f"{name}-{size}gb" if len(sizes) > 1 else name for name, sizes in sorted(_GPUS.items()) for size in sizes]


def gpu_bytes(name: str) -> int:
    """Total memory of a GPU type, as reported by ``nvidia-smi``.

    Args:
        name (str): ``l40s``, ``a100-80gb``, ``rtx4090``, ``NVIDIA H100 80GB HBM3``, ``v100-sxm2-32gb``, ... A type with
            several sizes means the smallest one unless the size is given.

    Returns:
        int: bytes; a program can use less, see :func:`usable_gpu_bytes`.

    Raises:
        ValueError: for an unknown name; the message lists the nearest known ones.
    """
    words = [word for word in re.split(r"[\s_\-]+", name.lower()) if word and word not in _NOISE]
    sizes = [int(match[1]) for word in words if (match := re.fullmatch(r"(\d+)g(?:i?b)?", word))]
    kind = "".join(word for word in words if not re.fullmatch(r"\d+g(?:i?b)?", word)).removeprefix("rtx")
    known = _GPUS.get(kind)
    if known is None or len(sizes) > 1 or (sizes and sizes[0] not in known):
        named = "-".join([kind, *(f"{size}gb" for size in sizes)])
        near = difflib.get_close_matches(named, gpu_names(), n=3, cutoff=0.5)
        hint = f"the nearest known: {', '.join(near)}" if near else f"known: {', '.join(gpu_names())}"
        raise ValueError(f"unknown GPU type {name!r}; {hint}")
    return known[sizes[0] if sizes else min(known)] * MIB


def usable_gpu_bytes(name: str) -> int:
    """Memory of a GPU type that PyTorch can use: the total minus the driver's reservation and a CUDA context.

    The two together are estimated as 3 % of the total, at least 1 GiB. For the types whose total as reported by PyTorch
    is known (0.97 to 0.995 of nvidia-smi's), this leaves enough memory for the context.

    Args:
        name (str): as in :func:`gpu_bytes`.

    Returns:
        int: bytes.

    Raises:
        ValueError: for an unknown name.
    """
    total = gpu_bytes(name)
    return total - max(GIB, total * 3 // 100)


@dataclass(frozen=True)
class GpuMemory:
    """Memory of PyTorch's CUDA allocator on all GPUs of this process, in bytes, and counts of failed allocations.

    Attributes:
        allocated: held by tensors.
        reserved: held by the allocator, for tensors or for reuse.
        peak_allocated: maximum of ``allocated`` since PyTorch's peaks were last reset.
        peak_reserved: maximum of ``reserved`` since PyTorch's peaks were last reset.
        alloc_retries: number of allocations that succeeded only after cached blocks were released.
        ooms: number of out-of-memory errors, including recovered ones.
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    alloc_retries: int
    ooms: int


@dataclass(frozen=True)
class Reading:
    """A run's memory at one point in time. Values that the system does not report are ``None`` or empty.

    Attributes:
        time: seconds, from ``time.monotonic``.
        processes: the run's processes.
        cgroups: the main process's groups, the innermost first.
        machine: RAM of the machine.
        gpu: memory of PyTorch's CUDA allocator, ``None`` until this process uses CUDA.
    """

    time: float
    processes: TreeMemory | None = None
    cgroups: tuple[CgroupMemory, ...] = ()
    machine: MachineMemory | None = None
    gpu: GpuMemory | None = None

    @property
    def limits(self) -> tuple[CgroupMemory, ...]:
        """Groups whose limit is smaller than the machine's RAM."""
        most = self.machine.total if self.machine is not None else None
        return tuple(
            [group for group in self.cgroups if group.limit is not None and (most is None or group.limit < most)]
        )

    def metrics(self) -> dict[str, int]:
        """Metrics to log, in bytes unless stated otherwise; unknown ones are absent.

        ``memory/``: ``rss``, ``anon``, ``shmem``, ``file`` and ``own`` (anonymous and shared) of all processes of the
        run, ``processes`` (their number), ``main_peak_rss`` (recorded by the kernel), ``available`` (RAM); for the
        cgroup with the smallest limit, or else the innermost one: ``cgroup_usage``, ``cgroup_limit``,
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
    """Take a reading of all memory.

    Args:
        pid (int, optional): main process of the run. Defaults to ``None``, this process. Cgroups and GPU memory are
            always those of this process.
        root (Path, optional): root directory of /proc and the cgroup mounts. Defaults to ``/``.
    """
    return Reading(
        time=time.monotonic(),
        processes=read_tree(pid, root=root),
        cgroups=memory_cgroups(root),
        machine=read_machine(root),
        gpu=read_gpu(),
    )


def read_gpu() -> GpuMemory | None:
    """Memory of PyTorch's CUDA allocator on all devices of this process.

    Returns ``None`` until this process uses CUDA; it neither imports torch nor initializes CUDA.
    """
    torch = sys.modules.get("torch")
    # While another thread is importing torch, the module may still lack these attributes.
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
