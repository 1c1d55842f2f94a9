"""``launch/submit.py``: a run as a job of its own, followed to its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pwm_torchrl
from pwm_torchrl.launch import console
from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.follow import Follower, stop_signals_as_interrupt
from pwm_torchrl.launch.help import help_text, wants_help
from pwm_torchrl.launch.job import CUDA_VARIABLE, LOG_FILE, OUTCOME_FILE, PID_FILE, PROGRESS_VARIABLE, run_job
from pwm_torchrl.launch.run_dir import prepare_run_dir, read_summary
from pwm_torchrl.launch.train import run_in_process
from pwm_torchrl.launch.validate import require_runnable

__all__ = ["main", "submit_local"]

ATTEMPTS = "submitit"  # folder in the run directory: one folder per attempt, with submitit's files
_TIMEOUT_MIN = 10 * 365 * 24 * 60  # submitit's local executor stops a job after 2 minutes unless told otherwise


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, submits the run, shows its progress and ends with its result or
    its error.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130 stopped.
    """
    words = list(argv or ())
    if wants_help(words):
        console.say(help_text("submit.py"))
        return console.OK
    config = compose(words)
    require_runnable(config)
    if config.run_dir is not None:
        _refuse_while_running(Path(config.run_dir).expanduser().absolute())
    run = prepare_run_dir(config)
    if config.cluster.kind == "debug":
        return run_in_process(config, run, words, script="submit.py")
    console.say(f"{'resuming' if run.resume else 'run'}: {run.path}")
    with stop_signals_as_interrupt():
        follower = submit_local(run.path)
        outcome = follower.follow()
    return _conclude(outcome, run.path, words)


def submit_local(run_dir: Path) -> Follower:
    """Starts the run of ``run_dir`` through submitit's local executor.

    Raises:
        ConfigurationError: if submitit is not installed.
    """
    try:
        from submitit.local.local import LocalExecutor
    except ImportError as error:
        raise console.ConfigurationError(
            "submitit is not installed; pip install 'pwm-torchrl[launch]', or use launch/train.py"
        ) from error
    attempt = _new_attempt(run_dir)
    log = run_dir / LOG_FILE
    log_start = log.stat().st_size if log.exists() else 0
    executor = LocalExecutor(folder=attempt)
    executor.update_parameters(timeout_min=_TIMEOUT_MIN, stderr_to_stdout=True)
    with _job_environment(), _terminal_signals_ignored():
        job: Any = executor.submit(run_job, str(run_dir))
    console.say(f"job {job.job_id} on this machine · log: {log} · Ctrl-C stops it")
    return Follower(job._process, run_dir, attempt, log_start)


def _refuse_while_running(run_dir: Path) -> None:
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
def _job_environment() -> Iterator[None]:
    """The environment variables that a job inherits, set while it is being started."""
    terminal = sys.stdout.isatty()
    changes = {
        "PYTHONPATH": os.pathsep.join([*_package_path(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        PROGRESS_VARIABLE: "bar" if terminal else "lines",
        CUDA_VARIABLE: os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
    }
    if terminal:
        size = shutil.get_terminal_size()
        changes.update(COLUMNS=str(size.columns), LINES=str(size.lines))  # tqdm wants both or neither
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


def _package_path() -> list[str]:
    """Where the job finds this very package; nothing if it is installed."""
    folder = Path(pwm_torchrl.__file__).resolve().parent.parent
    return [] if folder.name in ("site-packages", "dist-packages") else [str(folder)]


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


def _conclude(outcome: dict[str, Any], run_dir: Path, words: Sequence[str]) -> int:
    """Last lines and exit code."""
    status = outcome["status"]
    summary = read_summary(run_dir) or outcome.get("summary") or {}
    if status == "finished":
        console.say(console.summary_line(summary, run_dir))
        return console.OK
    if status == "stopped":
        console.say(console.summary_line({**summary, "status": "stopped"}, run_dir))
        console.say(console.resume_hint("submit.py", words, run_dir), err=True)
        return console.STOPPED
    message = f"{outcome.get('error', f'the run ended with status {status}')}\nfull log: {run_dir / LOG_FILE}"
    code = console.fail(message, status, "submit.py", words, run_dir)
    return console.BAD_INPUT if outcome.get("bad_input") else code
