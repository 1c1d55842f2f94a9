"""Stopping a run at its next step, from a signal or from code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from pwm_torchrl.terminal import say_after_interrupt, warn

#: What SLURM sends before it takes a job's nodes away: SIGUSR2 some time before, SIGTERM right before.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
#: Exit code of a process that reached no step in time and left its run to the last checkpoint.
NO_STEP_IN_TIME = 76


class StopInEpoch(Exception):
    """A stop was asked for and a step's boundary inside an epoch is reached; the run saves and ends."""


class StopRequest:
    """Whether a run was asked to stop, and why. Asking only sets a flag; the run looks at it between two steps."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.reached = threading.Event()

    def ask(self, reason: str) -> None:
        """Stop at the next step; the first reason stays."""
        if self.reason is None:
            self.reason = reason

    def check(self) -> None:
        """Called by the run between two steps.

        Raises:
            StopInEpoch: if a stop was asked for.
        """
        if self.reason is not None:
            self.reached.set()
            raise StopInEpoch(self.reason)


@contextlib.contextmanager
def stop_on_interrupt(stop: StopRequest) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM ask for a stop; a second SIGINT raises KeyboardInterrupt at once.

    Signals that another part of the program answers are left to it: a handler of SIGTERM that is not the default, both
    signals outside of the main thread, and SIGINT where it is ignored.

    Args:
        stop (StopRequest): what is asked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def ask(signum: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker: end as it would have without us
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
    """Inside, SIGUSR2 and SIGTERM ask for a stop and do nothing else.

    The signals are blocked and waited for by a thread, so that the flag is set while the main thread is inside a
    library that does not return to Python for minutes, such as a compiler. Children inherit the block: those that are
    forked never run a handler, and those that are started as programs begin deaf to both signals, which SLURM may send
    to every process of a job.

    Args:
        stop (StopRequest): what is asked.
        deadline_s (float, optional): seconds from the first signal in which a step must be reached; the process then
            ends with :data:`NO_STEP_IN_TIME`, and the run continues from its last checkpoint. Defaults to ``None``: no
            deadline.
        ignore_afterwards (bool): leave both signals ignored, for a process that has only its end before it. Defaults to
            ``False``: the handlers of before are put back.

    Raises:
        RuntimeError: outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("Signals can be taken over by a process's main thread only.")

    def note(signum: int, frame: object = None) -> None:
        stop.ask(signal.Signals(signum).name)

    # A library's thread that was started earlier does not block them; the kernel may choose it.
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
            signal.signal(each, signal.SIG_IGN)  # one that still waits is forgotten: it has been answered
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
            f"{stop.reason}: no step was completed within {deadline_s:g} s, so this process ends here and the run "
            "continues from its last checkpoint"
        )
        os._exit(NO_STEP_IN_TIME)
