"""Signals that ask a run to stop: a flag is set, children are left alone, a process that never looks ends in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pwm_torchrl.run.stop import NO_STEP_IN_TIME, SIGNALS, StopInEpoch, StopRequest, stop_on_interrupt, stop_on_signals

ROOT = Path(__file__).parents[2]


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def script(code: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


class TestRequest:
    def test_the_first_reason_stays(self):
        stop = StopRequest()
        stop.check()
        stop.ask("SIGUSR2")
        stop.ask("SIGTERM")
        with pytest.raises(StopInEpoch, match=r"^SIGUSR2$"):
            stop.check()
        assert stop.reached.is_set()


INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.usefixtures("free_signals")
class TestInterrupt:
    @pytest.mark.parametrize("number", INTERRUPTS)
    def test_asks_and_says_so(self, number, capsys):
        before = [signal.getsignal(each) for each in INTERRUPTS]
        stop = StopRequest()
        with stop_on_interrupt(stop):
            os.kill(os.getpid(), number)
            assert stop.reason == number.name
        assert [signal.getsignal(each) for each in INTERRUPTS] == before
        out = capsys.readouterr().out
        assert "saves its state at its next step" in out
        assert ("Ctrl-C again stops at once" in out) == (number == signal.SIGINT)

    def test_sigint_again_is_an_interrupt(self):
        with stop_on_interrupt(StopRequest()):
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_sigterm_again_is_nothing(self, capsys):
        stop = StopRequest()
        with stop_on_interrupt(stop):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert capsys.readouterr().out.count("stopping") == 1

    def test_what_another_part_of_the_program_answers_is_left_to_it(self):
        """A job answers SIGTERM by itself; a program that was started with SIGINT ignored goes on ignoring it."""
        taken = []
        signal.signal(signal.SIGTERM, lambda *_: taken.append("SIGTERM"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = StopRequest()
        with stop_on_interrupt(stop):
            for number in INTERRUPTS:
                os.kill(os.getpid(), number)
        assert taken == ["SIGTERM"]
        assert stop.reason is None

    def test_outside_of_the_main_thread_nothing_is_taken(self):
        found = []

        def enter() -> None:
            with stop_on_interrupt(StopRequest()):
                found.extend(signal.getsignal(each) for each in INTERRUPTS)

        before = [signal.getsignal(each) for each in INTERRUPTS]
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert found == before

    def test_a_fork_ends_as_it_would_have_without_us(self):
        """In a process of its own: these tests have threads."""
        done = script("""
import os, signal, time
from pwm_torchrl.run.stop import StopRequest, stop_on_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
stop, ends = StopRequest(), []
with stop_on_interrupt(stop):
    for number in (signal.SIGINT, signal.SIGTERM):
        reader, writer = os.pipe()
        fork = os.fork()
        if not fork:
            os.write(writer, b"here")  # a signal before that may be lost
            time.sleep(30)
            os._exit(7)
        os.read(reader, 4)
        os.kill(fork, number)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
print(ends, stop.reason)
""")
        assert done.stdout == "[-2, -15] None\n", done.stderr


class TestSignals:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_set_a_flag_and_nothing_else(self, number):
        before = [signal.getsignal(each) for each in SIGNALS]
        stop = StopRequest()
        with stop_on_signals(stop):
            os.kill(os.getpid(), number)
            until(lambda: stop.reason is not None)
            os.kill(os.getpid(), number)  # SLURM repeats itself
        assert stop.reason == signal.Signals(number).name
        assert [signal.getsignal(each) for each in SIGNALS] == before
        assert not [thread for thread in threading.enumerate() if thread.name == "stop-signals"]

    def test_are_seen_while_the_main_thread_is_in_a_library(self):
        """A handler of Python's would run when the call returns, which may take minutes."""
        done = script("""
import ctypes, os, signal, threading, time
from pwm_torchrl.run.stop import StopRequest, stop_on_signals
stop = StopRequest()
with stop_on_signals(stop):
    seen = []
    threading.Thread(target=lambda: (time.sleep(1), seen.append(stop.reason))).start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    ctypes.CDLL(None).sleep(2)  # does not return for signals that are blocked
    print(seen)
""")
        assert done.stdout == "['SIGUSR2']\n", done.stderr

    def test_children_begin_deaf_to_them(self):
        """Programs and forks: SLURM may send the signals to every process of a job."""
        stop = StopRequest()
        with stop_on_signals(stop):
            program = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(0.5); print('through')"],
                                       stdout=subprocess.PIPE, text=True)  # fmt: skip
            for number in SIGNALS:
                program.send_signal(number)
            out, _ = program.communicate(timeout=20)
            assert (program.returncode, out) == (0, "through\n")
            fork = os.fork()
            if not fork:
                time.sleep(0.5)
                os._exit(7 if stop.reason is None else 8)
            for number in SIGNALS:
                os.kill(fork, number)
            assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 7
        assert stop.reason is None

    def test_without_a_step_in_time_the_process_ends(self):
        done = script("""
import os, signal, time
from pwm_torchrl.run.stop import StopRequest, stop_on_signals
with stop_on_signals(StopRequest(), 0.3):
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(30)
""")
        assert done.returncode == NO_STEP_IN_TIME
        assert "SIGUSR2: no step was completed within 0.3 s" in done.stderr

    def test_a_step_in_time_has_all_the_time_it_needs_to_save(self):
        done = script("""
import os, signal, time
from pwm_torchrl.run.stop import StopInEpoch, StopRequest, stop_on_signals
stop = StopRequest()
with stop_on_signals(stop, 0.5):
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            stop.check()
        except StopInEpoch:
            break
    time.sleep(1)
    print("saved")
""")
        assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr

    def test_afterwards_they_can_be_ignored(self):
        done = script("""
import os, signal
from pwm_torchrl.run.stop import SIGNALS, StopRequest, stop_on_signals
with stop_on_signals(StopRequest(), ignore_afterwards=True):
    pass
for each in SIGNALS:
    os.kill(os.getpid(), each)
print("alive")
""")
        assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr

    def test_only_the_main_thread_takes_them(self):
        errors = []

        def enter() -> None:
            try:
                with stop_on_signals(StopRequest()):
                    pass
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert errors == ["Only the main thread of a process can set signal handlers."]
