"""The submitted function, and the few words that it and the command that follows it exchange.

A job is told nothing but its run directory. It writes its output to ``log.txt`` there and how it
ended to ``outcome.json`` in its attempt's folder, so that whoever follows it needs no pickle and
shows no pickle's traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from pwm_torchrl.cluster.job import LOG_FILE, output_to

__all__ = [
    "CUDA_VARIABLE",
    "LOG_FILE",
    "OUTCOME_FILE",
    "PID_FILE",
    "STATE_FILE",
    "JobFailed",
    "run_job",
]

OUTCOME_FILE = "outcome.json"
PID_FILE = "pid"
STATE_FILE = "progress.json"  # what the job is doing, where a terminal follows it
CUDA_VARIABLE = "PWM_TORCHRL_CUDA_VISIBLE_DEVICES"


class JobFailed(RuntimeError):
    """Marks the job as failed for submitit; the reason is in the outcome and in the log."""


def run_job(run_dir: str) -> dict[str, Any]:
    """Trains the run that ``run_dir`` describes; what submitit calls in the job's process.

    Args:
        run_dir: absolute path of a directory made by
            :func:`~pwm_torchrl.run.directory.prepare_run_dir`.

    Returns:
        The outcome: ``status`` and, where they exist, ``error``, ``bad_input``, ``log_end``.

    Raises:
        JobFailed: if training failed, or ended because memory or a disk ran out.
    """
    attempt = Path(os.environ["SUBMITIT_FOLDER"])
    _own_session(attempt)
    _restore_cuda()
    _stop_on_signals()
    with output_to(Path(run_dir) / LOG_FILE):
        outcome = _train(Path(run_dir), attempt)
    if "error" in outcome:
        raise JobFailed(outcome["error"])
    return outcome


def _train(run_dir: Path, attempt: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = {"status": "finished"}
    trace = ""
    try:
        from pwm_torchrl.run.directory import load_config, was_started
        from pwm_torchrl.training import train
        from pwm_torchrl.user_code import make_cwd_importable

        make_cwd_importable()
        summary = train(load_config(run_dir), run_dir, resume=was_started(run_dir))
        outcome["status"] = str(summary.get("status", "finished"))
        outcome["summary"] = summary
    except KeyboardInterrupt:
        outcome["status"] = "stopped"
    except (Exception, SystemExit) as failure:  # noqa: BLE001  whatever it is, it is reported
        trace = traceback.format_exc()
        outcome.update(_describe(failure))
    from pwm_torchrl.run.directory import set_status

    try:
        set_status(run_dir, outcome["status"])
    except OSError as unwritten:  # the disk that ended the run, and that the log may lie on, too
        with contextlib.suppress(OSError):
            sys.stderr.write(f"summary.json could not be written ({unwritten}); its status stays as it was\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Followers show the log up to here; the traceback behind it is for those who open the file.
    outcome["log_end"] = os.fstat(1).st_size
    partial = attempt / (OUTCOME_FILE + ".tmp")
    partial.write_text(json.dumps(outcome, default=str), encoding="utf-8")
    os.replace(partial, attempt / OUTCOME_FILE)
    with contextlib.suppress(OSError):
        sys.stderr.write(trace)
        sys.stderr.flush()
    return outcome


def _describe(failure: BaseException) -> dict[str, Any]:
    """The error in a few lines; our own messages stand for themselves, others need their type."""
    from pwm_torchrl.errors import ConfigurationError, is_ours, status_of

    text = str(failure).strip() or "no message"
    if is_ours(failure):
        bad_input = isinstance(failure, ConfigurationError)
        return {"status": status_of(failure), "error": text, "bad_input": bad_input}
    lines = text.splitlines()
    shown = "\n".join(lines[:4]) + (f"\n({len(lines) - 4} more lines in the log)" if len(lines) > 4 else "")
    frames = traceback.extract_tb(failure.__traceback__)
    where = f" (raised in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return {"status": "failed", "error": f"{type(failure).__name__}: {shown}{where}", "bad_input": False}


def _own_session(attempt: Path) -> None:
    """Leaves the terminal's process group, so that Ctrl-C reaches the follower alone and it can
    stop the job in order.
    """
    with contextlib.suppress(PermissionError):  # already the leader of a group of its own
        os.setsid()
    (attempt / PID_FILE).write_text(str(os.getpid()), encoding="utf-8")


def _restore_cuda() -> None:
    """Undoes that submitit's local executor hides every GPU that was not asked for by number."""
    if CUDA_VARIABLE in os.environ:
        visible = os.environ.pop(CUDA_VARIABLE)
        if visible == "unset":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _stop_on_signals() -> None:
    """SIGTERM, sent by the follower, becomes what Ctrl-C is to a program in the foreground: once.

    submitit ignores SIGTERM, and the follower starts the job with SIGINT ignored. Whatever handler training installs
    for SIGINT is the one that gets called.
    """
    owner = os.getpid()
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if os.getpid() != owner:  # a forked worker: end as it would have without us
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif not stopping:
            stopping = True
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)
