"""Memory use during training: sampled by a thread, logged with every epoch, and checked at the end of each epoch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from pwm_torchrl.config import MemoryConfig
from pwm_torchrl.memory.cgroups import CgroupMemory
from pwm_torchrl.memory.readings import Reading, format_bytes, read_memory

__all__ = ["Alarm", "Growth", "MemoryGuard", "MemoryWatch"]


# Maximum fraction of one core spent on sampling. A sample of many processes or much memory takes long, so the interval
# grows.
_MAX_LOAD = 0.02


class MemoryWatch:
    """Samples the memory of a run in a thread, and keeps the newest reading and the peaks.

    Args:
        interval (float, optional): seconds between two samples; it is extended so that sampling takes at most a
            fiftieth of the time. Defaults to ``1.0``.

    Keyword Args:
        read (callable, optional): takes a reading. Defaults to :func:`~pwm_torchrl.memory.readings.read_memory`.

    .. note::
        Python 3.12 and later warn when a process with threads forks. Fork worker processes before starting the watch.

    Examples:
        >>> from pwm_torchrl.memory.watch import MemoryWatch
        >>> with MemoryWatch() as watch:
        ...     watch.metrics()["memory/rss"] > 0
        True
    """

    def __init__(self, interval: float = 1.0, *, read: Callable[[], Reading] = read_memory) -> None:
        if interval <= 0:
            raise ValueError(f"interval={interval} must be positive")
        self.interval = interval
        self._read = read
        self._lock = threading.Lock()
        self._newest: Reading | None = None
        self._peaks: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def newest(self) -> Reading:
        """The thread's newest reading, or a new one if the thread is not running.

        Raises:
            RuntimeError: if the thread has failed.
        """
        self._raise_failure()
        newest = self._newest
        return newest if newest is not None and self.running else self.sample()

    @property
    def peaks(self) -> dict[str, int]:
        """The largest value so far of each metric of :meth:`Reading.metrics`."""
        with self._lock:
            return dict(self._peaks)

    def sample(self) -> Reading:
        """Take a reading now.

        Raises:
            RuntimeError: if the thread has failed.
        """
        self._raise_failure()
        return self._sample()

    def metrics(self) -> dict[str, int]:
        """Metrics of the newest reading (:meth:`Reading.metrics`) and ``memory/peak_own``, the largest sum of anonymous
        and shared memory so far.

        Raises:
            RuntimeError: if the thread has failed.
        """
        metrics = self.newest.metrics()
        peak = self.peaks.get("memory/own")
        return metrics if peak is None else {**metrics, "memory/peak_own": peak}

    def start(self) -> None:
        """Take one reading, then start the thread. Does nothing if it is running.

        Raises:
            RuntimeError: if the thread failed earlier.
        """
        if self.running:
            return
        self.sample()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Does nothing if it is not running.

        Raises:
            RuntimeError: if the thread has failed; this is raised once.
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
        else:  # do not replace the block's error by the thread's
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
            except BaseException as error:  # noqa: BLE001 - raised by the next call
                self._failure = error
                return
            pause = max(self.interval, (time.perf_counter() - start) / _MAX_LOAD)

    def _sample(self) -> Reading:
        reading = self._read()
        with self._lock:
            self._newest = reading
            for name, number in reading.metrics().items():
                self._peaks[name] = max(number, self._peaks.get(name, number))
        return reading

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"sampling memory failed: {self._failure!r}") from self._failure


@dataclass(frozen=True)
class Growth:
    """A kind of memory, and its bytes at the baseline and now."""

    kind: str
    before: int
    now: int

    @property
    def bytes(self) -> int:
        """Increase in bytes."""
        return self.now - self.before


@dataclass(frozen=True)
class Alarm:
    """Reports that memory that cannot be reclaimed is close to a limit.

    Attributes:
        used: memory that cannot be reclaimed, in bytes.
        limit: the limit, in bytes.
        place: description of the limit.
        growth: all kinds of memory, sorted by decreasing growth.
        message: one sentence with the amount, the limit and the kinds that grew.
    """

    used: int
    limit: int
    place: str
    growth: tuple[Growth, ...]
    message: str

    @property
    def fraction(self) -> float:
        """Fraction of the limit that is used."""
        return self.used / self.limit


class MemoryGuard:
    """Raises an alarm when memory that the kernel cannot reclaim comes close to a limit.

    Page cache does not count, because the kernel drops it when memory is needed. The checks are:

    - for each cgroup with a limit: the group's anonymous memory, shared memory and dirty pages;
    - for the explicit budget: anonymous and shared memory of all processes of the run;
    - without a cgroup limit: the same memory, compared with its sum with the RAM that is still available.

    ``ulimit -v`` is not checked: it limits addresses, and exceeding it raises an error instead of killing the process.
    On systems that report no memory (macOS), there is never an alarm.

    Args:
        limit_fraction (float, optional): fraction of a limit at which the alarm is raised. Defaults to ``0.85``.
        budget_bytes (int, optional): budget of the run, in bytes. Defaults to ``None``, no budget.
        dirty_seconds (float, optional): delay of an alarm that depends on dirty pages, in the readings' time. By
            default, the kernel starts to write dirty pages after 30 s at the latest; with cgroups of version 1, a
            burst of writes may fill much of a group without harm. Defaults to ``30.0``.

    Examples:
        >>> from pwm_torchrl.memory.readings import read_memory
        >>> from pwm_torchrl.memory.watch import MemoryGuard
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
        """Report growth relative to this reading, for example one after warm-up, instead of the first one checked."""
        self._baseline = reading

    def check(self, reading: Reading) -> Alarm | None:
        """The alarm for the limit with the largest fraction used; ``None`` if no limit is close."""
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
                    place = "the memory that this machine can give this run"
                    alarms.append(self._alarm(reading, own, reachable, place, _machine_parts))
        return max(alarms, key=lambda alarm: alarm.fraction, default=None)

    def _check_group(self, reading: Reading, group: CgroupMemory) -> Alarm | None:
        held, unwritten, limit = group.held, group.unwritten, group.limit or 0
        if held is None or unwritten is None:  # not reported: use the run's own memory, which is part of it
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
    """Bytes of each kind of memory that the run's processes hold."""
    tree = reading.processes
    if tree is None:
        return {}
    return {
        "anonymous memory of the main process": tree.main.anon,
        "anonymous memory of {workers}": tree.anon - tree.main.anon,
        "shared memory": tree.shmem,
    }


def _group_parts(reading: Reading, name: str) -> dict[str, int]:
    """Bytes of each kind of memory that a cgroup holds."""
    parts = _run_parts(reading)
    group = next((group for group in reading.cgroups if group.name == name), None)
    if group is None or group.anon is None:
        return parts
    own_anon = 0 if reading.processes is None else reading.processes.anon
    return {
        **parts,
        # The group's count includes files on tmpfs and shared memory that no process has mapped.
        "shared memory": group.shmem or 0,
        "dirty pages": group.unwritten or 0,
        "anonymous memory of processes outside the run": max(group.anon - own_anon, 0),
    }


def _machine_parts(reading: Reading) -> dict[str, int]:
    """Bytes of each kind of memory that the machine holds."""
    parts = _run_parts(reading)
    if reading.machine is not None:
        others = reading.machine.total - reading.machine.available - sum(parts.values())
        parts["memory of everything else on this machine"] = max(others, 0)
    return parts


def _what_grew(growth: list[Growth], used: int) -> str:
    """The kind that grew most, and the second one if it grew at least a quarter as much."""
    grown = [part for part in growth[:2] if part.bytes >= max(used // 100, growth[0].bytes // 4, 1)]
    if grown:
        return " and ".join(
            f"{part.kind} grew from {format_bytes(part.before)} to {format_bytes(part.now)}" for part in grown
        )
    largest = max(growth, key=lambda part: part.now, default=None)
    return "nothing grew" + (f"; the largest part is {largest.kind}, {format_bytes(largest.now)}" if largest else "")


INTERVAL_S = 1.0


class RunMemory:
    """Memory watch and memory guard of a run.

    If sampling fails, the failure is reported once and the run continues without memory metrics and alarms.

    Args:
        cfg (MemoryConfig): ``stop_at`` and ``host_gib``.
        on_failure (callable): called with a message if sampling fails.
    """

    def __init__(self, cfg: MemoryConfig, on_failure: Callable[[str], None]) -> None:
        self.watch = MemoryWatch(INTERVAL_S)
        self.guard = MemoryGuard(cfg.stop_at, None if cfg.host_gib is None else round(cfg.host_gib * 2**30))
        self.on_failure = on_failure
        self._failed = False
        self._warm = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the sampling thread inside the block.

        Fork worker processes before: a process with threads should not fork.
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
        """Metrics ``memory/...`` of the thread's newest reading; empty after a failure."""
        if self._failed:
            return {}
        try:
            return self.watch.metrics()
        except RuntimeError as error:
            self._fail(error)
            return {}

    def check(self, warm: bool) -> Alarm | None:
        """An alarm if the run should stop, otherwise ``None``.

        Args:
            warm (bool): whether training has allocated everything it needs. Growth is reported relative to the first
                reading for which this is true.
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
        """Largest sum of anonymous and shared memory of all processes so far, in bytes; 0 before the first reading."""
        return self.watch.peaks.get("memory/own", 0)

    def _fail(self, error: RuntimeError) -> None:
        if not self._failed:
            self._failed = True
            self.on_failure(f"{error}; the run continues without memory metrics and without the memory guard")
