"""Environments with worker processes: shielded from the terminal's signals, closed within seconds, named when they die.

TorchRL's ``ParallelEnv`` and gymnasium's ``AsyncVectorEnv`` start processes. Ctrl-C in a terminal goes to every process
of its group: workers that die of it take the run's last checkpoint with them. And a batch one of whose workers is dead
or hangs does not close by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from torchrl.envs import EnvBase

from pwm_torchrl.errors import EnvironmentFault

__all__ = ["OpenEnv", "ended_by_sigterm"]

#: Signals of a terminal or scheduler, for the run's main process to answer.
SHIELDED = (signal.SIGINT, signal.SIGTERM)
#: Seconds that an environment has to close before its workers are killed.
CLOSE_S = 5.0
#: Seconds by which exit codes may be behind the pipe that a dying worker broke.
DEATH_S = 0.2


class OpenEnv:
    """An environment and the processes that it started.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from pwm_torchrl.envs.workers import OpenEnv
        >>> with OpenEnv.opening("pendulum", seed=0) as opened:
        ...     env = opened.hold(GymEnv("Pendulum-v1"))
        >>> opened.close()
        >>> env.is_closed
        True
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.env: EnvBase | None = None
        self.workers: list[BaseProcess] = []

    @classmethod
    @contextmanager
    def opening(cls, name: str, seed: int) -> Iterator[OpenEnv]:
        """Inside, the environment is made and held; the processes that it starts do not see SIGINT and SIGTERM.

        Args:
            name (str): of the environment, for messages.
            seed (int): of its first sub-environment.
        """
        opened = cls(name, seed)
        before = multiprocessing.active_children()
        try:
            with signals_blocked():
                yield opened
                if opened.env is not None:
                    start_workers(opened.env)
        except BaseException:
            opened.workers = started_since(before)
            opened.close()
            raise
        opened.workers = started_since(before)

    def hold(self, env: EnvBase) -> EnvBase:
        """Take over an environment: :meth:`close` closes it."""
        self.env = env
        return env

    @contextmanager
    def naming_dead_workers(self) -> Iterator[None]:
        """Turn what a batch raises whose worker has died into an :class:`EnvironmentFault` that names it."""
        try:
            yield
        except Exception as error:
            deadline = time.monotonic() + DEATH_S
            for index, worker in enumerate(self.workers):
                if _has_died(worker, max(0.0, deadline - time.monotonic())):
                    raise EnvironmentFault(
                        self.name,
                        f"its worker process {worker.pid} has ended with exit code {worker.exitcode}",
                        seed=self.seed + index,
                        index=index,
                    ) from error
            raise

    def close(self) -> None:
        """Close the environment, and kill what is left of its workers after some seconds.

        Raises:
            Exception: what the environment raised while closing, once everything is closed; not where a worker had died
                before, since closing that batch cannot succeed.
        """
        env, self.env = self.env, None
        dead_before = any(_has_died(worker, 0.0) for worker in self.workers)
        failure: list[BaseException] = []

        def close() -> None:
            try:
                if env is not None and not env.is_closed:
                    env.close()
            except BaseException as error:  # noqa: BLE001 - raised below, from the thread that asked
                failure.append(error)

        if self.workers:
            thread = threading.Thread(target=close, name="close-env", daemon=True)
            thread.start()
            thread.join(CLOSE_S)
        else:
            close()
        self._end_workers()
        if failure and not dead_before:
            raise failure[0]

    def _end_workers(self) -> None:
        # A batch that closed in order has closed its process objects too, which then know nothing more.
        alive = [worker for worker in multiprocessing.active_children() if worker in self.workers]
        for worker in alive:
            worker.kill()  # not SIGTERM, from which they are shielded
        deadline = time.monotonic() + CLOSE_S
        for worker in alive:
            worker.join(max(0.1, deadline - time.monotonic()))
        self.workers = []


def _has_died(worker: BaseProcess, patience_s: float) -> bool:
    """Whether a process has ended by itself."""
    try:
        worker.join(patience_s)
        return worker.exitcode is not None
    except ValueError:  # closed, in order
        return False


def start_workers(env: EnvBase) -> None:
    """Start the processes of a batch that would otherwise begin with its first reset."""
    if getattr(env, "is_closed", False) and hasattr(env, "start"):
        env.start()


def started_since(before: list[BaseProcess]) -> list[BaseProcess]:
    """Processes started since ``before`` was taken, in that order, which is that of the sub-environments."""
    started = [each for each in multiprocessing.active_children() if each not in before]
    return sorted(started, key=lambda each: each.pid or 0)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`KeyboardInterrupt`, so that what is open is closed.

    Where somebody else answers it, and outside of the main thread, it is left to them.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(signum: int, frame: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(signum, signal.SIG_DFL)  # a forked worker: end as it would have without us
        os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread; processes that are started meanwhile inherit that for life."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    # Started now, since before Python 3.13 multiprocessing's resource tracker leaves both unblocked when it starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
