"""Stopping a run in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pwm_torchrl.terminal import say_after_interrupt
from pwm_torchrl.training.trainer import PWMTrainer


@contextmanager
def stop_on_interrupt(trainer: PWMTrainer) -> Iterator[None]:
    """SIGINT asks the trainer to stop after the epoch, with a checkpoint; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        trainer.request_stop("interrupted")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say_after_interrupt("stopping after this epoch ...")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
