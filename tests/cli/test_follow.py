"""What a terminal shows of a job: a program on a terminal of its own, with a training function that learns nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from forked_commands import LAUNCH, Command
from training_stub import KILLED, SLOW

pytest.importorskip("submitit")
pytest.importorskip("rich")

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
pytestmark = pytest.mark.usefixtures("free_signals", "stub_training", "workdir")


class Terminal:
    """``launch/submit.py`` on a terminal of some width."""

    def __init__(self, *words: str, width: int = 80, script: str = "submit") -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)
        self.descriptor, inside = pty.openpty()
        self.resize(width)
        if script == "submit":
            self.process = Command(script, "run_dir=run", *words, env=environment, terminal=inside)
        else:  # which trains itself: only a new Python finds the stub
            command = [sys.executable, str(LAUNCH / f"{script}.py"), "run_dir=run", *words]
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(inside)
        self.output = ""

    def resize(self, width: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Read until it has shown a text."""
        end = time.monotonic() + seconds
        while text not in ESCAPE.sub("", self.output):
            assert time.monotonic() < end, self.output[-2000:]
            self.output += os.read(self.descriptor, 65536).decode(errors="replace")

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        with contextlib.suppress(OSError):  # Linux's way of saying that the other side is closed
            while chunk := os.read(self.descriptor, 65536):
                self.output += chunk.decode(errors="replace")
        os.close(self.descriptor)
        return self.process.wait()

    @property
    def lines(self) -> list[str]:
        """Every line that was written, without colours."""
        return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", self.output)) if line]

    @property
    def drawn(self) -> list[str]:
        """Those of the progress display."""
        return [line for line in self.lines if line.startswith("return ") or re.match(r"━+[━╸╺]*  epoch", line)]


def test_progress_fits_the_terminal_and_follows_its_size():
    terminal = Terminal(f"seed={SLOW}", "training.epochs=60", width=60)
    terminal.wait_for("epoch 20\r\n")
    before = len(terminal.drawn)
    terminal.resize(40)
    assert terminal.end() == 0, terminal.output
    assert max(map(len, terminal.drawn)) <= 58
    assert max(len(line) for line in terminal.drawn[-6:]) <= 38
    assert 0 < before < len(terminal.drawn)
    assert any(re.match(r"return -9\d\d\.0  [0-9,]+/6,000 env steps  0:0\d left", line) for line in terminal.drawn)
    assert [line for line in terminal.lines if re.fullmatch(r"epoch \d+", line)] == [f"epoch {n}" for n in range(1, 61)]
    end = terminal.lines.index("pendulum residual tiny seed 5: finished")
    assert terminal.lines[end + 1].startswith("  final return -120.0 (peak -100.0, random -1200.0)")
    assert not set(terminal.lines[end:]) & set(terminal.drawn)
    assert "\x1b[32mfinished\x1b[0m" in terminal.output
    assert not re.search(r"\[\d:\d\d:\d\d\]", terminal.output)  # the log's lines of progress
    log = Path("run/log.txt").read_text()
    assert re.search(r"^\[0:00:\d\d\] return -940\.0, 6,000/6,000 env steps, ", log, re.MULTILINE)
    assert "\r" not in log
    assert "\x1b" not in log


def test_ctrl_c_stops_and_the_display_is_gone():
    terminal = Terminal(f"seed={SLOW}", "training.epochs=300")
    terminal.wait_for("epoch 3\r\n")
    os.write(terminal.descriptor, b"\x03")
    assert terminal.end() == 130
    stopping = terminal.lines.index("stopping: the job saves its state first (Ctrl-C again kills it) ...")
    assert "saving" in terminal.lines[stopping:]
    assert "pendulum residual tiny seed 5: stopped" in terminal.output.replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert "to resume: " in terminal.output
    assert "\x1b[33mstopped\x1b[0m" in terminal.output


def test_runs_one_after_the_other_and_one_that_is_killed():
    terminal = Terminal(f"seed=0,{KILLED}", "run_dir=null", "training.epochs=3")
    assert terminal.end() == 1, terminal.output
    assert len([line for line in terminal.lines if line.startswith("pendulum residual tiny seed 0: finished")]) == 1
    assert "\x1b[1;31merror\x1b[0m: the job's process ended without a result" in terminal.output
    assert any(line.startswith("full log: ") for line in terminal.lines)
    assert "evaluate.py" in terminal.output.split("next:")[1]  # of the run that finished


@pytest.mark.parametrize("script", ["submit", "train"])
def test_nothing_is_drawn_where_that_is_not_wanted(script):
    terminal = Terminal("training.progress=false", f"seed={SLOW}", "training.epochs=12", script=script)
    assert terminal.end() == 0, terminal.output
    assert not terminal.drawn
    assert "starting" not in terminal.lines
    log = Path("run/log.txt").read_text() if script == "submit" else terminal.output
    assert "epoch 12" in log
    assert not re.search(r"\[\d:\d\d:\d\d\]", log)


def test_train_draws_in_its_own_process():
    terminal = Terminal(f"seed={SLOW}", "training.epochs=12", script="train")
    assert terminal.end() == 0, terminal.output
    assert terminal.drawn
    assert [line for line in terminal.lines if line.startswith("pendulum residual tiny seed 5: finished")]
