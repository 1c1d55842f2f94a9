"""Jobs on this machine through submitit's local executor."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pwm_torchrl.commands import named
from pwm_torchrl.launch import console
from pwm_torchrl.launch.follow import Follower
from pwm_torchrl.launch.job import CUDA_VARIABLE, LOG_FILE, OUTCOME_FILE, PID_FILE, STATE_FILE, run_job
from pwm_torchrl.terminal import STATE_VARIABLE, has_terminal

if TYPE_CHECKING:
    from pwm_torchrl.display import Display

__all__ = ["ATTEMPTS", "refuse_while_running", "submit_local"]

ATTEMPTS = "submitit"  # folder in the run directory: one folder per attempt, with submitit's files
_TIMEOUT_MIN = 10 * 365 * 24 * 60  # submitit's local executor stops a job after 2 minutes unless told otherwise


def submit_local(run_dir: Path, code: Sequence[Path], *, progress: bool) -> Follower:
    """Starts the run of ``run_dir`` through submitit's local executor.

    Args:
        run_dir: a prepared run directory.
        code: copies of the code, see :func:`~pwm_torchrl.cluster.snapshot.snapshot`.
        progress: whether its progress is to be shown, ``training.progress``.

    Raises:
        ConfigurationError: if submitit is not installed.
    """
    try:
        from submitit.local.local import LocalExecutor
    except ImportError as error:
        raise console.ConfigurationError(
            f"submitit is not installed; pip install 'pwm-torchrl[launch]', or use {named('train')}"
        ) from error
    attempt = _new_attempt(run_dir)
    log = run_dir / LOG_FILE
    log_start = log.stat().st_size if log.exists() else 0
    executor = LocalExecutor(folder=attempt)
    executor.update_parameters(timeout_min=_TIMEOUT_MIN, stderr_to_stdout=True)
    drawn = progress and has_terminal(sys.stdout)
    with _job_environment(code, attempt / STATE_FILE if drawn else None), _terminal_signals_ignored():
        job: Any = executor.submit(run_job, str(run_dir))
    console.say(f"job {job.job_id} on this machine · log: {log.name} there · Ctrl-C stops it")
    return Follower(job._process, run_dir, attempt, log_start, _display() if drawn else None)


def _display() -> Display:
    from pwm_torchrl.display import Display

    return Display()


def refuse_while_running(run_dir: Path) -> None:
    """Two jobs in one directory would overwrite each other's files."""
    for file in sorted((run_dir / ATTEMPTS).glob(f"*/{PID_FILE}")):
        if (file.parent / OUTCOME_FILE).exists():
            continue
        try:
            pid = int(file.read_text(encoding="utf-8"))
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue  # no such process, or a system that does not tell
        if str(file.parent).encode() in command_line:
            raise console.ConfigurationError(
                f"run_dir={run_dir} belongs to a job that is still running here, process {pid}; wait for it, or stop "
                f"it with: kill {pid}"
            )


def _new_attempt(run_dir: Path) -> Path:
    """A folder of its own for every attempt: submitit names its files by process ids, which come
    back.
    """
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
    """The environment variables that a job inherits, set while it is being started."""
    changes = {
        "PYTHONPATH": os.pathsep.join([*map(str, code), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",  # or the working directory would come before the copy of its code
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
    """Starts submitit's controller deaf to Ctrl-C: it would kill the job one second later, saved
    or not.
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
