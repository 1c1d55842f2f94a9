"""Stopping a run at its next step, by a signal or from code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from pwm_torchrl.terminal import say_after_interrupt, warn

#: Signals that SLURM sends before it ends a job: SIGUSR2 some time before, SIGTERM right before.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
#: Exit code of a process that reached no step in time, so that its run continues from the last checkpoint.
NO_STEP_IN_TIME = 76


class StopInEpoch(Exception):
    """A stop was requested and the run has reached a step inside an epoch, where it saves and ends."""


class StopRequest:
    """A request to stop a run, and its reason. It only sets a flag, which the run checks between two steps."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.reached = threading.Event()

    def ask(self, reason: str) -> None:
        """Request a stop at the next step; the first reason is kept."""
        if self.reason is None:
            self.reason = reason

    def check(self) -> None:
        """Check for a request; the run calls this between two steps.

        Raises:
            StopInEpoch: if a stop was requested.
        """
        if self.reason is not None:
            self.reached.set()
            raise StopInEpoch(self.reason)


@contextlib.contextmanager
def stop_on_interrupt(stop: StopRequest) -> Iterator[None]:
    """Make SIGINT and SIGTERM request a stop inside the block; a second SIGINT raises KeyboardInterrupt at once.

    Existing handlers are kept: a handler of SIGTERM that is not the default, and an ignored SIGINT. Outside of the main
    thread, nothing is changed.

    Args:
        stop (StopRequest): the request that is set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def ask(signum: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker: use the default handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if stop.reason is None:
            stop.ask(signal.Signals(signum).name)
            again = " (Ctrl-C again stops at once)" if signum == signal.SIGINT else ""
            say_after_interrupt(f"stopping: the run saves its state at its next step{again} ...")

    taken = {}
    for each, free in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(each) == free:
            taken[each] = signal.signal(each, ask)
    try:
        yield
    finally:
        for each, handler in taken.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def stop_on_signals(
    stop: StopRequest, deadline_s: float | None = None, *, ignore_afterwards: bool = False
) -> Iterator[None]:
    """Make SIGUSR2 and SIGTERM request a stop inside the block.

    The signals are blocked and a thread waits for them, so that the flag is set even while the main thread is inside a
    library that does not return to Python for minutes, such as a compiler. Child processes inherit the block: forked
    ones run no handler, and started programs ignore both signals, which SLURM may send to all processes of a job.

    Args:
        stop (StopRequest): the request that is set.
        deadline_s (float, optional): seconds after the first signal within which a step must be reached. Otherwise, the
            process ends with :data:`NO_STEP_IN_TIME`, and the run continues from its last checkpoint. Defaults to
            ``None``, no deadline.
        ignore_afterwards (bool): ignore both signals after the block, for a process that is about to end. Defaults to
            ``False``, which restores the earlier handlers.

    Raises:
        RuntimeError: outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("Only the main thread of a process can set signal handlers.")

    def note(signum: int, frame: object = None) -> None:
        stop.ask(signal.Signals(signum).name)

    # Threads that were started earlier do not block the signals, so the kernel may deliver them there.
    handlers = {each: signal.signal(each, note) for each in SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    closing = threading.Event()
    waiter = threading.Thread(
        target=_wait_for_signals, args=(stop, closing, deadline_s), name="stop-signals", daemon=True
    )
    waiter.start()
    try:
        yield
    finally:
        stop.reached.set()
        closing.set()
        waiter.join()
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # discards a pending signal, which has been handled
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for each, handler in handlers.items():
            if not ignore_afterwards:
                signal.signal(each, handler)


def _wait_for_signals(stop: StopRequest, closing: threading.Event, deadline_s: float | None) -> None:
    while not closing.is_set():
        received = signal.sigtimedwait(SIGNALS, 0.2)
        if received is not None:
            stop.ask(signal.Signals(received.si_signo).name)
        if stop.reason is not None:
            break
    if stop.reason is None or deadline_s is None:
        return
    if not stop.reached.wait(deadline_s):
        warn(
            f"{stop.reason}: no step was completed within {deadline_s:g} s, so this process ends and the run continues "
            "from its last checkpoint"
        )
        os._exit(NO_STEP_IN_TIME)
