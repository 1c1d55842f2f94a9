"""Commands of ``launch/`` in processes of their own that are forked from the warm server of :mod:`forked_runs`.

A new Python takes 5 s of CPU time to import torch and TorchRL. A forked process has them already, and otherwise behaves
like a command on a terminal: it has its own arguments, folder, environment, output, session and signals.
``tests/cli/test_entry_points.py`` tests that a new Python can start the commands.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch
from forked_runs import TESTS, forked

LAUNCH = TESTS.parent / "launch"


class Command:
    """A running command, with the part of ``subprocess.Popen``'s interface that tests use.

    Args:
        name: ``"train"`` for ``launch/train.py``.
        words: its arguments.
        cwd: its working directory; by default, this process's.
        env: its whole environment; by default, this process's.
        terminal: descriptor of its terminal; without one, its output goes to pipes.
    """

    def __init__(
        self,
        name: str,
        *words: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        terminal: int | None = None,
    ) -> None:
        self.args = [str(LAUNCH / f"{name}.py"), *words]
        pipes = [] if terminal is not None else [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        ends = [Connection(os.dup(terminal))] if terminal is not None else [end for _, end in pipes]
        environment = dict(os.environ if env is None else env)
        self._process = forked(_become, self.args, str(cwd or Path.cwd()), environment, *ends)
        for end in ends:
            end.close()
        self._said = [b""] * 2
        self._readers = [
            threading.Thread(target=self._read, args=(number, pipe), daemon=True)
            for number, (pipe, _) in enumerate(pipes)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, pipe: Connection) -> None:
        with pipe:
            while some := os.read(pipe.fileno(), 2**16):
                self._said[number] += some

    @property
    def pid(self) -> int:
        """Process ID, which is also that of its process group, since it has its own session."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 180.0) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 180.0) -> tuple[str, str]:
        """Output and errors, when it and all processes that it started have closed them."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = (said.decode().replace("\r\n", "\n") for said in self._said)
        return out, err

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    name: str, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = Command(name, *words, cwd=cwd, env=env)
    out, err = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def _become(args: list[str], folder: str, environment: dict[str, str], *ends: Connection) -> NoReturn:
    """Turn the forked process into the command."""
    os.setsid()
    if len(ends) == 1:
        fcntl.ioctl(ends[0].fileno(), termios.TIOCSCTTY, 0)
        os.dup2(ends[0].fileno(), 0)
    for stream, end in ((1, ends[0]), (2, ends[-1])):
        os.dup2(end.fileno(), stream)
    for end in ends:
        end.close()
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    search = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.argv = args
    sys.path[:] = [str(LAUNCH), *search, *(entry for entry in sys.path if not Path(entry).is_relative_to(TESTS))]
    multiprocessing.current_process().name = "MainProcess"
    torch.set_num_threads(1)
    runpy.run_path(args[0], run_name="__main__")
    sys.exit(0)
