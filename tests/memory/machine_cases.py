"""Files of /proc and cgroups of imaginary machines, for readings on other systems."""

from __future__ import annotations

import os
from pathlib import Path

from pwm_torchrl.memory.cgroups import CgroupMemory
from pwm_torchrl.memory.readings import GIB, MIB, MachineMemory, ProcessMemory, Reading, TreeMemory

UNLIMITED_V1 = 9223372036854771712


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below a directory."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def process(pid: int, parent: int, *, anon: int, shmem: int = 0, file: int = 0, name: str = "python") -> dict[str, str]:
    """Files of a process in /proc; sizes in KiB."""
    amounts = {"VmSize": 4 * anon, "VmHWM": 2 * anon, "VmRSS": anon + shmem + file}
    amounts |= {"RssAnon": anon, "RssFile": file, "RssShmem": shmem}
    lines = [f"Name:\t{name}", "State:\tS (sleeping)", *(f"{key}:\t{value:8} kB" for key, value in amounts.items())]
    return {
        f"proc/{pid}/stat": f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194560",
        f"proc/{pid}/status": "\n".join([*lines, "Threads:\t1"]) + "\n",
    }


def rollup(pid: int, *, anon: int, shmem: int, file: int) -> dict[str, str]:
    """Shares of a process; sizes in KiB."""
    amounts = {"Rss": 10**6, "Pss": anon + shmem + file, "Pss_Anon": anon, "Pss_File": file, "Pss_Shmem": shmem}
    lines = ["5628c22f9000-7fff9ccbe000 ---p 00000000 00:00 0   [rollup]"]
    return {
        f"proc/{pid}/smaps_rollup": "\n".join([*lines, *(f"{key}: {value:10} kB" for key, value in amounts.items())])
    }


def meminfo(total: int, available: int) -> dict[str, str]:
    """RAM in KiB."""
    return {"proc/meminfo": f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\nHugePages_Total: 0\n"}


def v1_group(
    directory: str, *, limit: int = UNLIMITED_V1, usage: int = 0, hierarchy: str = "1", **stat: int
) -> dict[str, str]:
    """Files of a group of version 1; ``stat`` as in memory.stat, in bytes."""
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{usage}\n",
        f"{directory}/memory.use_hierarchy": f"{hierarchy}\n",
        f"{directory}/memory.stat": "".join(f"{name} {value}\n" for name, value in stat.items()),
    }


def v2_group(directory: str, *, most: str = "max", high: str = "max", usage: int = 0, **stat: int) -> dict[str, str]:
    """Files of a group of version 2, in bytes."""
    return {
        f"{directory}/memory.max": f"{most}\n",
        f"{directory}/memory.high": f"{high}\n",
        f"{directory}/memory.current": f"{usage}\n",
        f"{directory}/memory.stat": "".join(f"{name} {value}\n" for name, value in stat.items()),
    }


def reading(
    *,
    time: float = 0.0,
    main: int = 100 * MIB,
    workers: tuple[int, ...] = (),
    shmem: int = 0,
    limit: int | None = None,
    dirty: int = 0,
    cache: int = 0,
    others: int = 0,
    available: int = 60 * GIB,
    total: int = 64 * GIB,
) -> Reading:
    """A reading of a run in one group: anonymous memory of its processes, and of others in the group."""

    def one(pid: int, anon: int, shared: int = 0) -> ProcessMemory:
        return ProcessMemory(pid, anon + shared, anon, shared, 0, peak=anon, virtual=2 * anon)

    tree = TreeMemory(
        one(os.getpid(), main, shmem), tuple(one(10**6 + index, anon) for index, anon in enumerate(workers))
    )
    anon = main + sum(workers) + others
    group = CgroupMemory(
        name="/job",
        path=Path("/sys/fs/cgroup/job"),
        version=2,
        limit=limit,
        limit_file=None if limit is None else "memory.max",
        usage=anon + shmem + cache + dirty,
        anon=anon,
        shmem=shmem,
        file=shmem + cache + dirty,
        dirty=dirty,
        writeback=0,
    )
    return Reading(time, tree, (group,), MachineMemory(total, available))
