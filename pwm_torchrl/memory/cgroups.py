"""Memory limits and usage of this process's control groups (cgroups).

SLURM, containers and systemd limit memory with cgroups, and the kernel kills a process of the group that reaches its
limit. The memory controller belongs to a hierarchy of version 1 or 2; if both are mounted (hybrid), it belongs to
exactly one of them.

The kernel drops clean page cache when a group needs memory, so a group at its limit can be healthy. It cannot drop
anonymous memory, shared memory or pages that are not yet written to disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupMemory", "memory_cgroups", "tightest"]

_ROOT = Path("/")

# Version 1 reports "no limit" as the largest number of pages, in bytes; the value depends on the page size.
_UNLIMITED = 2**62


@dataclass(frozen=True)
class CgroupMemory:
    """Memory of a group and its descendants, in bytes.

    Attributes:
        name: the group's path below the mount, "/" for the outermost visible group.
        path: the group's directory.
        version: 1 or 2.
        limit: the smallest of the group's limits, ``None`` if it has none.
        limit_file: the file that contains this limit: ``memory.max``, ``memory.high``, ``memory.limit_in_bytes``, or
            ``memory.stat`` for a limit above the visible groups.
        usage: all memory charged to the group, including page cache.
        anon: anonymous memory. This and the following are ``None`` if the kernel does not report them.
        shmem: shared memory and files on tmpfs.
        file: page cache, including ``shmem``.
        dirty: modified pages that are not yet being written.
        writeback: pages that are being written to disk.
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
        """Anonymous and shared memory, which only its owner can free."""
        return None if self.anon is None else self.anon + (self.shmem or 0)

    @property
    def unwritten(self) -> int | None:
        """Dirty pages and pages under writeback, which can be reclaimed once they are on disk."""
        return None if self.anon is None else (self.dirty or 0) + (self.writeback or 0)

    @property
    def unreclaimable(self) -> int | None:
        """Memory that the kernel cannot reclaim now: anonymous + shared + dirty + under writeback."""
        return None if self.held is None else self.held + (self.unwritten or 0)


@dataclass(frozen=True)
class _Version:
    """File names and ``memory.stat`` line names of one cgroup version."""

    number: int
    usage: str
    limits: tuple[str, ...]
    anon: str
    shmem: str
    file: str
    dirty: str
    writeback: str


# In version 1, the lines that start with "total_" include descendants; in version 2, all lines do.
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
    """This process's groups that account for memory, from the innermost to the outermost visible one.

    Args:
        root (Path, optional): root directory of /proc and the cgroup mounts. Defaults to ``/``.

    Returns:
        tuple of CgroupMemory: empty on systems without cgroups or without a memory controller.
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
    # Version 2 has a single hierarchy, listed without controller names.
    for version, controller in ((_V1, "memory"), (_V2, "")):
        if controller in paths:
            for mount, mounted in _mounts(mounts, version.number):
                outermost, own = _directories(root / mount.lstrip("/"), mounted, paths[controller])
                groups = _read_up(outermost, own, version)
                if groups:
                    return groups
    return ()


def tightest(groups: Iterable[CgroupMemory]) -> CgroupMemory | None:
    """The group with the smallest limit, the innermost one if several are equal; ``None`` if no group has a limit."""
    limited = [(group.limit, group) for group in groups if group.limit is not None]
    return min(limited, key=lambda pair: pair[0])[1] if limited else None


def _mounts(mountinfo: str, version: int) -> list[tuple[str, str]]:
    """Mount points of the memory controller's hierarchy, each with the group that it shows."""
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
    r"""Decode a path of mountinfo, which escapes spaces and other characters in octal: ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _directories(mount: Path, shown: str, path: str) -> tuple[Path, Path]:
    """Directories of the outermost visible group and of the process's group.

    In a container, /proc may report a path outside of the mount; the mount itself is the process's group then.
    """
    inside = Path(path).is_relative_to(shown) and ".." not in Path(path).parts
    own = mount / Path(path).relative_to(shown) if inside else mount
    return mount, own if own.is_dir() else mount


def _read_up(mount: Path, own: Path, version: _Version) -> tuple[CgroupMemory, ...]:
    """Read all groups from a directory up to the mount point."""
    groups = []
    for directory in (own, *own.parents):
        # These groups have no usage file: the root of version 2, and groups without the memory controller.
        if (directory / version.usage).exists():
            groups.append(_read(directory, mount, version))
        above = directory.parent / "memory.use_hierarchy"
        # With 0, in version 1, the ancestors neither account for nor limit this group.
        if directory == mount or (above.exists() and above.read_text(encoding="utf-8").strip() == "0"):
            break
    return tuple(groups)


def _read(directory: Path, mount: Path, version: _Version) -> CgroupMemory:
    stat = _stat(directory / "memory.stat")
    limits = {name: _limit((directory / name).read_text(encoding="utf-8")) for name in version.limits}
    if directory == mount:
        # In a container the ancestors are not visible, but version 1 reports the smallest of their limits.
        limits["memory.stat"] = _limit(str(stat.get("hierarchical_memory_limit", "max")))
    set_ones = {name: limit for name, limit in limits.items() if limit is not None}
    limit_file = min(set_ones, key=lambda name: set_ones[name], default=None)
    split = {}
    if version.anon in stat:
        lines = {"shmem": version.shmem, "file": version.file, "dirty": version.dirty, "writeback": version.writeback}
        # A kernel without one of these lines does not count that kind separately.
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
    """Parse a limit file: bytes, or ``None`` for no limit."""
    text = text.strip()
    return None if text == "max" or int(text) >= _UNLIMITED else int(text)


def _stat(path: Path) -> dict[str, int]:
    """Parse the lines ``name 123`` of a file; empty if the file does not exist."""
    if not path.exists():
        return {}
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
