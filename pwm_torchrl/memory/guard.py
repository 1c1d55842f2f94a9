"""When to stop before the kernel does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pwm_torchrl.memory.cgroups import CgroupMemory
from pwm_torchrl.memory.readings import Reading
from pwm_torchrl.memory.units import format_bytes

__all__ = ["Alarm", "Growth", "MemoryGuard"]


@dataclass(frozen=True)
class Growth:
    """One kind of memory, in words, and its bytes at the baseline and now."""

    kind: str
    before: int
    now: int

    @property
    def bytes(self) -> int:
        """Bytes gained."""
        return self.now - self.before


@dataclass(frozen=True)
class Alarm:
    """Memory that cannot be reclaimed is close to a limit.

    Attributes:
        used: such memory, in bytes.
        limit: the limit, in bytes.
        place: the limit, in words.
        growth: every kind of memory, the one that grew most first.
        message: one sentence: what reached which limit, and what grew.
    """

    used: int
    limit: int
    place: str
    growth: tuple[Growth, ...]
    message: str

    @property
    def fraction(self) -> float:
        """Share of the limit that is used."""
        return self.used / self.limit


class MemoryGuard:
    """Says when a run comes close to a memory limit with memory that the kernel cannot take back.

    Page cache never counts: a group that is full of it is healthy. What counts, and against what:

    - in each cgroup with a limit: the group's anonymous and shared memory, and its dirty pages;
    - against the explicit budget: anonymous and shared memory of all processes of the run;
    - without a limit by a cgroup: the same, against the same and the RAM that is still available.

    ``ulimit -v`` is not watched: it bounds addresses and not memory, and running into it is an error that a program
    can handle, no kill. On systems that tell nothing (macOS) there is never an alarm.

    Args:
        limit_fraction (float, optional): share of a limit that raises the alarm. Defaults to ``0.85``.
        budget_bytes (int, optional): budget of the run, in bytes. Defaults to ``None``, no budget.
        dirty_seconds (float, optional): an alarm that depends on dirty pages waits this long, in the readings' time.
            The kernel writes them, and by default starts at the latest after 30 s; under cgroups of version 1, a
            burst of writes may fill much of a group with them and do no harm. Defaults to ``30.0``.

    Examples:
        >>> from pwm_torchrl.memory.readings import read_memory
        >>> MemoryGuard(budget_bytes=2**50).check(read_memory()) is None
        True
    """

    def __init__(
        self, limit_fraction: float = 0.85, budget_bytes: int | None = None, *, dirty_seconds: float = 30.0
    ) -> None:
        if not 0 < limit_fraction <= 1:
            raise ValueError(f"limit_fraction={limit_fraction} must be above 0 and at most 1")
        if budget_bytes is not None and budget_bytes <= 0:
            raise ValueError(f"budget_bytes={budget_bytes} must be positive")
        self.limit_fraction = limit_fraction
        self.budget_bytes = budget_bytes
        self.dirty_seconds = dirty_seconds
        self._baseline: Reading | None = None
        self._dirty_since: dict[str, float] = {}

    def set_baseline(self, reading: Reading) -> None:
        """Compare with this reading from now on, for example with one after warm-up; otherwise with the first one
        checked.
        """
        self._baseline = reading

    def check(self, reading: Reading) -> Alarm | None:
        """The alarm of the limit that is closest, ``None`` if all are far enough."""
        if self._baseline is None:
            self._baseline = reading
        alarms = [alarm for group in reading.limits if (alarm := self._check_group(reading, group)) is not None]
        if reading.processes is not None:
            own = reading.processes.own
            if self.budget_bytes is not None and own >= self.limit_fraction * self.budget_bytes:
                alarms.append(self._alarm(reading, own, self.budget_bytes, "the budget", _run_parts))
            if not reading.limits and reading.machine is not None:
                reachable = own + reading.machine.available
                if own >= self.limit_fraction * reachable:
                    place = "what this machine can give this run"
                    alarms.append(self._alarm(reading, own, reachable, place, _machine_parts))
        return max(alarms, key=lambda alarm: alarm.fraction, default=None)

    def _check_group(self, reading: Reading, group: CgroupMemory) -> Alarm | None:
        held, unwritten, limit = group.held, group.unwritten, group.limit or 0
        if held is None or unwritten is None:  # not told: what the run itself holds is a part of it
            held, unwritten = 0 if reading.processes is None else reading.processes.own, 0
        threshold = self.limit_fraction * limit
        if held + unwritten < threshold:
            self._dirty_since.pop(group.name, None)
            return None
        since = self._dirty_since.setdefault(group.name, reading.time)
        if held < threshold and reading.time - since < self.dirty_seconds:
            return None
        place = f"the limit of cgroup {group.name} ({group.limit_file})"
        return self._alarm(reading, held + unwritten, limit, place, partial(_group_parts, name=group.name))

    def _alarm(
        self, reading: Reading, used: int, limit: int, place: str, parts: Callable[[Reading], dict[str, int]]
    ) -> Alarm:
        before, now = parts(self._baseline or reading), parts(reading)
        count = 0 if reading.processes is None else len(reading.processes.workers)
        workers = f"{count} worker process{'' if count == 1 else 'es'}"
        growth = [Growth(kind.format(workers=workers), before.get(kind, 0), held) for kind, held in now.items()]
        growth.sort(key=lambda part: part.bytes, reverse=True)
        message = (
            f"memory that cannot be reclaimed reached {format_bytes(used)}, {100 * used / limit:.0f} % of {place}, "
            f"{format_bytes(limit)}: {_what_grew(growth, used)}"
        )
        return Alarm(used, limit, place, tuple(growth), message)


def _run_parts(reading: Reading) -> dict[str, int]:
    """Bytes by kind, in words, of what the run's processes hold."""
    tree = reading.processes
    if tree is None:
        return {}
    return {
        "anonymous memory of the main process": tree.main.anon,
        "anonymous memory of {workers}": tree.anon - tree.main.anon,
        "shared memory": tree.shmem,
    }


def _group_parts(reading: Reading, name: str) -> dict[str, int]:
    """The same of what a cgroup holds."""
    parts = _run_parts(reading)
    group = next((group for group in reading.cgroups if group.name == name), None)
    if group is None or group.anon is None:
        return parts
    own_anon = 0 if reading.processes is None else reading.processes.anon
    return {
        **parts,
        # Files on tmpfs and shared memory that nobody has mapped are in the group's count only.
        "shared memory": group.shmem or 0,
        "dirty pages": group.unwritten or 0,
        "anonymous memory of processes outside of the run": max(group.anon - own_anon, 0),
    }


def _machine_parts(reading: Reading) -> dict[str, int]:
    """The same of what the machine holds."""
    parts = _run_parts(reading)
    if reading.machine is not None:
        others = reading.machine.total - reading.machine.available - sum(parts.values())
        parts["memory of everything else on this machine"] = max(others, 0)
    return parts


def _what_grew(growth: list[Growth], used: int) -> str:
    """The kinds that gained most: the second too if it gained at least a quarter of the first."""
    grown = [part for part in growth[:2] if part.bytes >= max(used // 100, growth[0].bytes // 4, 1)]
    if grown:
        return " and ".join(
            f"{part.kind} grew from {format_bytes(part.before)} to {format_bytes(part.now)}" for part in grown
        )
    largest = max(growth, key=lambda part: part.now, default=None)
    return "nothing grew" + (f"; the most is {largest.kind}, {format_bytes(largest.now)}" if largest else "")
