"""Jobs on this machine: starts them, shows their output, and stops them in an orderly way."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from submitit.local.local import LocalExecutor

from pwm_torchrl.cli import console
from pwm_torchrl.cluster.job import CUDA_VARIABLE, LOG_FILE, OUTCOME_FILE, PID_FILE, STATE_FILE, run_job
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.progress import drawn_here
from pwm_torchrl.run.directory import set_status
from pwm_torchrl.terminal import PROGRESS_LINE, STATE_VARIABLE, State, StateFile, say_after_interrupt

if TYPE_CHECKING:
    from pwm_torchrl.display import Display

__all__ = ["ATTEMPTS", "Follower", "refuse_while_running", "stop_signals_as_interrupt", "submit_local"]

_POLL_S = 0.1
_REPEAT_STOP_S = 3.0
_DRAW_S = 0.25


class _Process(Protocol):
    """The methods of the controller's ``subprocess.Popen`` that are used."""

    def poll(self) -> int | None: ...
    def send_signal(self, signum: int) -> None: ...


class Follower:
    """Shows the output of one attempt of a run.

    On a terminal, progress is drawn from the state file that the job writes, and progress lines in the log are left
    out. Otherwise, the log is shown as it is.

    Args:
        process: submitit's controller, which runs as long as the job.
        run_dir: the run's directory.
        attempt: the attempt's folder inside it.
        log_start: size of the log when the job was submitted; what precedes it is from earlier attempts.
        display: shows the progress; ``None`` without a terminal, or if progress is not to be shown.
    """

    def __init__(
        self, process: _Process, run_dir: Path, attempt: Path, log_start: int, display: Display | None = None
    ) -> None:
        self._process = process
        self._run_dir = run_dir
        self._attempt = attempt
        self._position = log_start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last_character = "\n"
        self._display = display
        self._state = State(started=time.monotonic(), phase="starting", phase_since=time.monotonic())
        self._drawn = 0.0  # time at which the display was last drawn
        self._line = ""  # the beginning of an incomplete line

    def follow(self) -> dict[str, Any]:
        """Shows the job's output until it ends; Ctrl-C stops the job, a second one kills it.

        Returns:
            The job's outcome, see :func:`~pwm_torchrl.cluster.job.run_job`.
        """
        try:
            return self._follow()
        finally:
            if self._display is not None:
                self._display.close()

    def _follow(self) -> dict[str, Any]:
        try:
            return self._wait(stopping=False)
        except KeyboardInterrupt:
            say_after_interrupt("stopping: the job saves its state first (Ctrl-C again kills it) ...", err=True)
        try:
            return self._wait(stopping=True)
        except KeyboardInterrupt:
            self._kill()
            set_status(self._run_dir, "stopped")
            return {"status": "stopped"}

    def _wait(self, *, stopping: bool) -> dict[str, Any]:
        next_stop = 0.0
        while True:
            running = self._process.poll() is None
            outcome = self._show()
            if not running:
                break
            if stopping and outcome is None and time.monotonic() >= next_stop:
                # Repeated, because the job may not have installed its handler yet; it reacts only to the first one.
                self._process.send_signal(signal.SIGTERM)
                next_stop = time.monotonic() + _REPEAT_STOP_S
            time.sleep(_POLL_S)
        if self._line or self._last_character not in "\r\n":
            self._write("\n")
        if outcome is None:
            outcome = {"status": "stopped"} if stopping else self._died()
            set_status(self._run_dir, outcome["status"])
        return outcome

    def _show(self) -> dict[str, Any] | None:
        """Prints new lines of the log; returns the outcome once there is one.

        The log is read before the outcome, because the job writes a traceback, which is not to be shown, after the
        outcome.
        """
        fresh = b""
        with contextlib.suppress(FileNotFoundError), open(self._run_dir / LOG_FILE, "rb") as log:
            log.seek(self._position)
            fresh = log.read()
        outcome = None
        with contextlib.suppress(FileNotFoundError):
            outcome = json.loads((self._attempt / OUTCOME_FILE).read_text(encoding="utf-8"))
            fresh = fresh[: max(0, outcome["log_end"] - self._position)]
        self._position += len(fresh)
        self._write(self._decoder.decode(fresh))
        if self._display is not None:
            now = time.monotonic()
            if now - self._drawn >= _DRAW_S:
                self._drawn = now
                self._state = StateFile.read(self._attempt / STATE_FILE) or self._state
                self._display.show(self._state, now)
        return outcome

    def _write(self, text: str) -> None:
        if self._display is not None:
            *lines, self._line = (self._line + text).split("\n")
            text = "".join(line + "\n" for line in lines if not PROGRESS_LINE.match(line))
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last_character = text[-1]

    def _died(self) -> dict[str, Any]:
        """The outcome of a job that wrote none, because it was killed or did not start."""
        output = "".join(p.read_text(errors="replace") for p in sorted(self._attempt.glob("*_log.*")))
        started = (self._attempt / PID_FILE).exists()
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        if started or not last:
            error = (
                "the job's process ended without a result: it was killed from outside, or ran out of memory, or its "
                "disk is full or broken"
            )
        else:
            error = f"the job did not start: {last.strip()}"
        return {"status": "failed", "error": error, "bad_input": False}

    def _kill(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((self._attempt / PID_FILE).read_text()), signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def stop_signals_as_interrupt() -> Iterator[None]:
    """Treats SIGHUP (a closed terminal) and SIGTERM like Ctrl-C, so that the job is stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kept = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


ATTEMPTS = "submitit"  # folder in the run directory: one folder per attempt, with submitit's files
_TIMEOUT_MIN = 10 * 365 * 24 * 60  # the default of submitit's local executor is 2 minutes


def submit_local(run_dir: Path, code: Sequence[Path], *, progress: bool) -> Follower:
    """Starts the run of ``run_dir`` with submitit's local executor.

    Args:
        run_dir: a prepared run directory.
        code: copies of the code, see :func:`~pwm_torchrl.cluster.snapshot.snapshot`.
        progress: whether to show its progress, ``training.progress``.
    """
    attempt = _new_attempt(run_dir)
    log = run_dir / LOG_FILE
    log_start = log.stat().st_size if log.exists() else 0
    executor = LocalExecutor(folder=attempt)
    executor.update_parameters(timeout_min=_TIMEOUT_MIN, stderr_to_stdout=True)
    display = drawn_here() if progress else None
    with _job_environment(code, None if display is None else attempt / STATE_FILE), _terminal_signals_ignored():
        job: Any = executor.submit(run_job, str(run_dir))
    console.say(f"job {job.job_id} on this machine · log: {log.name} there · Ctrl-C stops it")
    return Follower(job._process, run_dir, attempt, log_start, display)


def refuse_while_running(run_dir: Path) -> None:
    """Rejects a run directory that has a running job on this machine: two jobs would overwrite each other's files.

    Raises:
        ConfigurationError: if there is such a job.
    """
    for file in sorted((run_dir / ATTEMPTS).glob(f"*/{PID_FILE}")):
        if (file.parent / OUTCOME_FILE).exists():
            continue
        try:
            pid = int(file.read_text(encoding="utf-8"))
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue  # no such process, or no /proc
        if str(file.parent).encode() in command_line:
            raise ConfigurationError(
                f"run_dir={run_dir} belongs to a job that is still running here, process {pid}; wait for it, or stop "
                f"it with: kill {pid}"
            )


def _new_attempt(run_dir: Path) -> Path:
    """Create a new folder for the attempt: submitit names its files by process ids, which are reused."""
    folder = run_dir / ATTEMPTS
    number = 1
    while True:
        attempt = folder / f"attempt_{number}"
        try:
            attempt.mkdir(parents=True)
            return attempt
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def _job_environment(code: Sequence[Path], state_file: Path | None = None) -> Iterator[None]:
    """Set the environment variables that a job inherits while it is started."""
    changes = {
        "PYTHONPATH": os.pathsep.join([*map(str, code), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",  # otherwise the working directory would precede the copy of the code
        STATE_VARIABLE: "" if state_file is None else str(state_file),
        CUDA_VARIABLE: os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
    }
    kept = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _terminal_signals_ignored() -> Iterator[None]:
    """Ignore Ctrl-C while submitit's controller is started, which inherits this.

    Otherwise, the controller would kill the job one second after Ctrl-C, whether it has saved or not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
