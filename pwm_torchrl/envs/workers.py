"""Environments with worker processes: blocks signals in workers, closes them within seconds, and reports dead ones.

TorchRL's ``ParallelEnv`` and gymnasium's ``AsyncVectorEnv`` start processes. Ctrl-C in a terminal reaches every process
of its group; if it killed the workers, the run could not save its last checkpoint. A batch with a dead or hanging
worker does not close by itself.
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

#: Signals of a terminal or scheduler that only the run's main process handles.
SHIELDED = (signal.SIGINT, signal.SIGTERM)
#: Seconds after which the workers of an environment that does not close are killed.
CLOSE_S = 5.0
#: Seconds that a dead worker's exit code may arrive after its broken pipe.
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
        """Make and :meth:`hold` the environment inside this context: its processes will not receive SIGINT and SIGTERM.

        Args:
            name (str): the environment's name, for messages.
            seed (int): seed of its first sub-environment.
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
        """Register an environment for :meth:`close`."""
        self.env = env
        return env

    @contextmanager
    def naming_dead_workers(self) -> Iterator[None]:
        """If a worker has died, convert the batch's error to an :class:`EnvironmentFault` that names the worker."""
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
        """Close the environment, and kill workers that are still alive after some seconds.

        Raises:
            Exception: the environment's error while closing, after everything is closed; not if a worker had died
                before, since such a batch cannot close without error.
        """
        env, self.env = self.env, None
        dead_before = any(_has_died(worker, 0.0) for worker in self.workers)
        failure: list[BaseException] = []

        def close() -> None:
            try:
                if env is not None and not env.is_closed:
                    env.close()
            except BaseException as error:  # noqa: BLE001 - raised below, in the calling thread
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
        # A batch that closed properly has also closed its process objects, which cannot be queried any more.
        alive = [worker for worker in multiprocessing.active_children() if worker in self.workers]
        for worker in alive:
            worker.kill()  # they block SIGTERM
        deadline = time.monotonic() + CLOSE_S
        for worker in alive:
            worker.join(max(0.1, deadline - time.monotonic()))
        self.workers = []


def _has_died(worker: BaseProcess, patience_s: float) -> bool:
    """Whether a process has ended without being closed."""
    try:
        worker.join(patience_s)
        return worker.exitcode is not None
    except ValueError:  # closed properly
        return False


def start_workers(env: EnvBase) -> None:
    """Start the processes of a batch that would otherwise start at its first reset."""
    if getattr(env, "is_closed", False) and hasattr(env, "start"):
        env.start()


def started_since(before: list[BaseProcess]) -> list[BaseProcess]:
    """Processes started since ``before`` was taken, in order of their start, which is that of the sub-environments."""
    started = [each for each in multiprocessing.active_children() if each not in before]
    return sorted(started, key=lambda each: each.pid or 0)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the context, SIGTERM raises :class:`KeyboardInterrupt`, so that open environments are closed.

    No effect if SIGTERM already has a handler, or outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(signum: int, frame: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(signum, signal.SIG_DFL)  # a forked worker: default action
        os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread; processes started meanwhile inherit this permanently."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    # Start it first: before Python 3.13, starting multiprocessing's resource tracker unblocks both signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
