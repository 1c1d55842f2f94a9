"""A thread that looks at a run's memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from pwm_torchrl.memory.readings import Reading, read_memory

__all__ = ["MemoryWatch"]

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
