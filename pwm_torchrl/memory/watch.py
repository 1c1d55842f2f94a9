"""Memory while a run trains: sampled by a thread, logged with every epoch, and checked at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from pwm_torchrl.config import MemoryConfig
from pwm_torchrl.memory.cgroups import CgroupMemory
from pwm_torchrl.memory.readings import Reading, format_bytes, read_memory

__all__ = ["Alarm", "Growth", "MemoryGuard", "MemoryWatch"]

_ROOT = Path("/")

# Of one core, at most, for looking: with many processes or much memory a look takes long, and comes less often.
_SHARE = 0.02


class MemoryWatch:
    """Samples the memory of a run, and keeps the newest reading and the peaks.

    Args:
        interval (float, optional): seconds between two looks; more where a look takes longer than a fiftieth of that.
            Defaults to ``1.0``.
        pid (int, optional): main process of the run. Defaults to ``None``, this one.
        root (Path, optional): where /proc and cgroups are found. Defaults to ``/``.

    .. note::
        Python 3.12 and later warn when a process with threads forks. Start the watch after worker processes that are
        forked.

    Examples:
        >>> with MemoryWatch() as watch:
        ...     watch.metrics()["memory/rss"] > 0
        True
    """

    def __init__(self, interval: float = 1.0, *, pid: int | None = None, root: Path = _ROOT) -> None:
        if interval <= 0:
            raise ValueError(f"interval={interval} must be positive")
        self.interval = interval
        self._pid = pid
        self._root = root
        self._lock = threading.Lock()
        self._newest: Reading | None = None
        self._peaks: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def newest(self) -> Reading:
        """The newest reading: the thread's, or, while it does not run, one taken now.

        Raises:
            RuntimeError: if the thread has failed.
        """
        self._raise_failure()
        newest = self._newest
        return newest if newest is not None and self.running else self.sample()

    @property
    def peaks(self) -> dict[str, int]:
        """The largest value so far of each of :meth:`Reading.metrics`."""
        with self._lock:
            return dict(self._peaks)

    def sample(self) -> Reading:
        """Look now.

        Raises:
            RuntimeError: if the thread has failed.
        """
        self._raise_failure()
        return self._sample()

    def metrics(self) -> dict[str, int]:
        """Numbers of the newest reading (:meth:`Reading.metrics`), and ``memory/peak_own``: the largest sum of
        anonymous and shared memory that was seen.

        Raises:
            RuntimeError: if the thread has failed.
        """
        metrics = self.newest.metrics()
        peak = self.peaks.get("memory/own")
        return metrics if peak is None else {**metrics, "memory/peak_own": peak}

    def start(self) -> None:
        """Look once, then start the thread; nothing if it runs.

        Raises:
            RuntimeError: if the thread has failed before.
        """
        if self.running:
            return
        self.sample()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and forget its failure once it is told; nothing if it does not run.

        Raises:
            RuntimeError: if the thread has failed.
        """
        self._join()
        try:
            self._raise_failure()
        finally:
            self._failure = None

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:  # what ended the block matters more than what may have ended the thread
            self._join()

    def _join(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, stopping: threading.Event) -> None:
        pause = self.interval
        while not stopping.wait(pause):
            start = time.perf_counter()
            try:
                self._sample()
            except BaseException as error:  # noqa: BLE001 - raised where the watch is asked next
                self._failure = error
                return
            pause = max(self.interval, (time.perf_counter() - start) / _SHARE)

    def _sample(self) -> Reading:
        reading = read_memory(self._pid, root=self._root)
        with self._lock:
            self._newest = reading
            for name, number in reading.metrics().items():
                self._peaks[name] = max(number, self._peaks.get(name, number))
        return reading

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"watching memory failed: {self._failure!r}") from self._failure


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


INTERVAL_S = 1.0


class RunMemory:
    """Watch and guard of a run.

    If watching fails, the run goes on without: it is told once, and nothing is logged or guarded any more.

    Args:
        cfg (MemoryConfig): ``stop_at`` and ``host_gb``.
        on_failure (callable): called with a sentence if watching fails.
    """

    def __init__(self, cfg: MemoryConfig, on_failure: Callable[[str], None]) -> None:
        self.watch = MemoryWatch(INTERVAL_S)
        self.guard = MemoryGuard(cfg.stop_at, None if cfg.host_gb is None else round(cfg.host_gb * 1e9))
        self.on_failure = on_failure
        self._failed = False
        self._warm = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block; whatever ends it, no thread is left.

        Worker processes are forked before: a process that has threads should not fork.
        """
        self.watch.start()
        try:
            yield
        finally:
            try:
                self.watch.stop()
            except RuntimeError as error:
                self._fail(error)

    def metrics(self) -> dict[str, int]:
        """The newest numbers, ``memory/...``; a look costs nothing here, the watch's thread took it."""
        if self._failed:
            return {}
        try:
            return self.watch.metrics()
        except RuntimeError as error:
            self._fail(error)
            return {}

    def check(self, warm: bool) -> Alarm | None:
        """Whether the run should stop.

        Args:
            warm (bool): whether everything that training needs has been allocated by now. What grew is told by
                comparison with the first time that it is so.
        """
        if self._failed:
            return None
        try:
            if warm and not self._warm:
                self._warm = True
                self.guard.set_baseline(self.watch.sample())
            return self.guard.check(self.watch.newest)
        except RuntimeError as error:
            self._fail(error)
            return None

    @property
    def peak_own(self) -> int:
        """Most anonymous and shared memory of all processes of the run that was seen, in bytes; 0 if none was."""
        return self.watch.peaks.get("memory/own", 0)

    def _fail(self, error: RuntimeError) -> None:
        if not self._failed:
            self._failed = True
            self.on_failure(f"{error}; the run goes on without a watch on its memory")
