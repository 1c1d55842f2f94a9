"""Memory limits and usage of the control groups (cgroups) that this process is in.

SLURM, containers and systemd limit memory by cgroups, and the kernel kills in the group that reaches its limit. The
memory controller is in a hierarchy of version 1 or 2; with both mounted (hybrid), it is in exactly one of them.

What fills a group is not all alike. Clean page cache is given up when the group needs room, so that a group at its
limit is often in perfect health; anonymous memory, shared memory and pages still to be written are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupMemory", "memory_cgroups", "tightest"]

_ROOT = Path("/")

# Version 1 writes "no limit" as the largest count of pages, a number that depends on the page size.
_UNLIMITED = 2**62


@dataclass(frozen=True)
class CgroupMemory:
    """Memory of one group and of the groups below it, in bytes.

    Attributes:
        name: the group's path below the mount, "/" for the outermost that can be seen.
        path: the group's directory.
        version: 1 or 2.
        limit: the tighter of the group's limits, ``None`` without one.
        limit_file: the file that sets it: ``memory.max`` or ``memory.high``, ``memory.limit_in_bytes``, or
            ``memory.stat`` for a limit above the groups that can be seen.
        usage: all memory charged to the group, page cache included.
        anon: anonymous memory. This and what follows is ``None`` where the kernel does not split the usage.
        shmem: shared memory and files on tmpfs.
        file: page cache, ``shmem`` included.
        dirty: pages changed and not yet on their way to the disk.
        writeback: pages on their way to the disk.
    """

    name: str
    path: Path
    version: int
    limit: int | None
    limit_file: str | None
    usage: int
    anon: int | None = None
    shmem: int | None = None
    file: int | None = None
    dirty: int | None = None
    writeback: int | None = None

    @property
    def held(self) -> int | None:
        """Anonymous and shared memory: only who holds it gives it back."""
        return None if self.anon is None else self.anon + (self.shmem or 0)

    @property
    def unwritten(self) -> int | None:
        """Pages that can be reclaimed once they are on the disk: dirty and under writeback."""
        return None if self.anon is None else (self.dirty or 0) + (self.writeback or 0)

    @property
    def unreclaimable(self) -> int | None:
        """What the kernel cannot take back now: anonymous + shared + dirty + under writeback."""
        return None if self.held is None else self.held + (self.unwritten or 0)


@dataclass(frozen=True)
class _Version:
    """Names of files, and of lines in ``memory.stat``, in one version of cgroups."""

    number: int
    usage: str
    limits: tuple[str, ...]
    anon: str
    shmem: str
    file: str
    dirty: str
    writeback: str


# Version 1 counts the groups below in the lines that start with "total_"; version 2 does so in all.
_V1 = _Version(
    number=1,
    usage="memory.usage_in_bytes",
    limits=("memory.limit_in_bytes",),
    anon="total_rss",
    shmem="total_shmem",
    file="total_cache",
    dirty="total_dirty",
    writeback="total_writeback",
)
_V2 = _Version(
    number=2,
    usage="memory.current",
    limits=("memory.max", "memory.high"),
    anon="anon",
    shmem="shmem",
    file="file",
    dirty="file_dirty",
    writeback="file_writeback",
)


def memory_cgroups(root: Path = _ROOT) -> tuple[CgroupMemory, ...]:
    """The groups of this process that count memory, from the innermost to the outermost that can be seen.

    Args:
        root (Path, optional): where /proc and the mounts are found. Defaults to ``/``.

    Returns:
        tuple of CgroupMemory: empty where there are none (macOS, or no memory controller).
    """
    try:
        membership = (root / "proc/self/cgroup").read_text(encoding="utf-8")
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    paths = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    # Version 2 has one hierarchy, which names no controllers.
    for version, controller in ((_V1, "memory"), (_V2, "")):
        if controller in paths:
            for mount, mounted in _mounts(mounts, version.number):
                place = _place(root / mount.lstrip("/"), mounted, paths[controller])
                groups = _read_up(*place, version)
                if groups:
                    return groups
    return ()


def tightest(groups: Iterable[CgroupMemory]) -> CgroupMemory | None:
    """The group with the smallest limit, the innermost of equals; ``None`` if none has one."""
    limited = [(group.limit, group) for group in groups if group.limit is not None]
    return min(limited, key=lambda pair: pair[0])[1] if limited else None


def _mounts(mountinfo: str, version: int) -> list[tuple[str, str]]:
    """Where the hierarchy of the memory controller is mounted: mount points, and the group that each one shows."""
    found = []
    for line in mountinfo.splitlines():
        # 35 31 0:32 /shown /mount/point options ... - type source options
        before, _, after = line.partition(" - ")
        _, _, _, shown, point, *_ = before.split()
        kind, _, options = after.split(maxsplit=2)
        if (kind == "cgroup2") if version == 2 else (kind == "cgroup" and "memory" in options.split(",")):
            found.append((_unescape(point), _unescape(shown)))
    return found


def _unescape(path: str) -> str:
    r"""A path of mountinfo, which writes spaces and the like in octal: ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _place(mount: Path, shown: str, path: str) -> tuple[Path, Path]:
    """The outermost visible directory and the process's own.

    In a container, /proc may tell a path outside of what is mounted; what is mounted is the process's group then.
    """
    inside = Path(path).is_relative_to(shown) and ".." not in Path(path).parts
    own = mount / Path(path).relative_to(shown) if inside else mount
    return mount, own if own.is_dir() else mount


def _read_up(mount: Path, own: Path, version: _Version) -> tuple[CgroupMemory, ...]:
    """Readings from a directory up to the mount point."""
    groups = []
    for directory in (own, *own.parents):
        # The root of version 2 counts nothing, nor does a group to which its parent does not delegate memory.
        if (directory / version.usage).exists():
            groups.append(_read(directory, mount, version))
        above = directory.parent / "memory.use_hierarchy"
        # With 0, in version 1, the groups above neither count nor limit this one.
        if directory == mount or (above.exists() and above.read_text(encoding="utf-8").strip() == "0"):
            break
    return tuple(groups)


def _read(directory: Path, mount: Path, version: _Version) -> CgroupMemory:
    stat = _stat(directory / "memory.stat")
    limits = {name: _limit((directory / name).read_text(encoding="utf-8")) for name in version.limits}
    if directory == mount:
        # In a container the groups above are out of sight, but version 1 tells the tightest of their limits.
        limits["memory.stat"] = _limit(str(stat.get("hierarchical_memory_limit", "max")))
    set_ones = {name: limit for name, limit in limits.items() if limit is not None}
    limit_file = min(set_ones, key=lambda name: set_ones[name], default=None)
    split = {}
    if version.anon in stat:
        lines = {"shmem": version.shmem, "file": version.file, "dirty": version.dirty, "writeback": version.writeback}
        # Kernels that lack a line do not count that kind apart from the others.
        split = {"anon": stat[version.anon], **{kind: stat.get(line, 0) for kind, line in lines.items()}}
    return CgroupMemory(
        name="/" + "/".join(directory.relative_to(mount).parts),
        path=directory,
        version=version.number,
        limit=None if limit_file is None else set_ones[limit_file],
        limit_file=limit_file,
        usage=int((directory / version.usage).read_text(encoding="utf-8")),
        **split,
    )


def _limit(text: str) -> int | None:
    """Bytes, ``None`` for no limit."""
    text = text.strip()
    return None if text == "max" or int(text) >= _UNLIMITED else int(text)


def _stat(path: Path) -> dict[str, int]:
    """The lines ``name 123`` of a file, empty without the file."""
    if not path.exists():
        return {}
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
