"""The memory of a run while it trains: watched, logged with every epoch and checked at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pwm_torchrl.config import MemoryConfig
from pwm_torchrl.memory.guard import Alarm, MemoryGuard
from pwm_torchrl.memory.watch import MemoryWatch

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
