"""The function that a job runs, on this machine or under SLURM, and the files with its output and outcome.

The run directory is a job's only argument. The job writes its output to ``log.txt`` there and its outcome to a JSON
file, so that a process that waits for it does not depend on submitit's pickle files and their tracebacks. Does not
import torch: the training code is imported in the job.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl import training
from pwm_torchrl.cluster.restarts import JobExecution, record_slurm_restart
from pwm_torchrl.commands import named
from pwm_torchrl.distributed.rendezvous import SUBMITIT, is_replica
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, is_ours, status_of
from pwm_torchrl.files import write_durably
from pwm_torchrl.run.directory import load_config, set_status, was_started
from pwm_torchrl.run.stop import StopRequest, stop_on_signals
from pwm_torchrl.user_code import make_cwd_importable

__all__ = [
    "CUDA_VARIABLE",
    "LOG_FILE",
    "OUTCOME_FILE",
    "PID_FILE",
    "STATE_FILE",
    "JobFailed",
    "require_submitit",
    "run_job",
]

LOG_FILE = "log.txt"
#: Files in the folder of an attempt on this machine.
OUTCOME_FILE = "outcome.json"
PID_FILE = "pid"
STATE_FILE = "progress.json"  # the job's progress, for the terminal that follows it
#: The user's value of ``CUDA_VISIBLE_DEVICES``; submitit's local executor hides every GPU that is not requested.
CUDA_VARIABLE = "PWM_TORCHRL_CUDA_VISIBLE_DEVICES"


class JobFailed(RuntimeError):
    """Marks the job as failed for submitit; the reason is in the outcome and in the log."""


def require_submitit() -> None:
    """Checks that jobs can be submitted.

    Raises:
        MissingLibraryError: if submitit is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise MissingLibraryError(
            f"submitit is not installed; pip install 'pwm-torchrl[launch]', or use {named('train')}"
        )


@dataclass(frozen=True)
class _Surroundings:
    """Settings that differ between a job on this machine and a SLURM job.

    Attributes:
        log (Path): file for the output of this process.
        outcome (Path, optional): file for the outcome; ``None`` on ranks other than 0.
        deadline_s (float, optional): seconds after a signal within which a step must be reached.
    """

    log: Path
    outcome: Path | None
    deadline_s: float | None

    @classmethod
    def of_slurm(cls, run: Path) -> _Surroundings:
        """In a SLURM job: half of the time between SLURM's signal and the end may be used to reach a step."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))  # set for a single task, too
        log = run / (LOG_FILE if rank == 0 else f"log_rank{rank}.txt")
        outcome = None if is_replica() else JobExecution.here().outcome_file(run)
        return cls(log, outcome, load_config(run).cluster.signal_delay_s / 2)

    @classmethod
    def of_this_machine(cls, run: Path) -> _Surroundings:
        """In a process that submitit started on this machine.

        It gets its own session, so that Ctrl-C reaches only the terminal's process, which then stops the job in an
        orderly way. All GPUs that the user sees become visible again.
        """
        attempt = Path(os.environ["SUBMITIT_FOLDER"])
        with contextlib.suppress(PermissionError):  # already a process group leader
            os.setsid()
        (attempt / PID_FILE).write_text(str(os.getpid()), encoding="utf-8")
        restore_cuda()
        return cls(run / LOG_FILE, attempt / OUTCOME_FILE, None)


def run_job(run_dir: str) -> dict[str, Any]:
    """Trains the run of a directory; submitit calls this function in the job's process.

    SIGUSR2 and SIGTERM stop the run at its next step. Under SLURM, the process exits if no step is reached within half
    of the time that SLURM gives; the run can then resume from its last checkpoint. The batch script decides what to do.

    Args:
        run_dir (str): absolute path of a directory created by :func:`~pwm_torchrl.run.directory.prepare_run_dir`.

    Returns:
        dict: the outcome: ``status`` and, if they exist, ``summary``, ``error``, ``bad_input``, ``log_end``.

    Raises:
        JobFailed: if training failed, or ended because memory or a disk ran out.
    """
    run, stop = Path(run_dir), StopRequest()
    slurm = os.environ.get(SUBMITIT) == "slurm"
    here = _Surroundings.of_slurm(run) if slurm else _Surroundings.of_this_machine(run)
    with _output_to(here.log), stop_on_signals(stop, here.deadline_s, ignore_afterwards=True):
        outcome, trace = _train(run, stop, slurm=slurm)
        if here.outcome is not None:
            _tell(run, outcome, here.outcome)
        with contextlib.suppress(OSError):
            sys.stderr.write(trace)
            sys.stderr.flush()
    if "error" in outcome:
        raise JobFailed(outcome["error"])
    return outcome


def _train(run: Path, stop: StopRequest, *, slurm: bool) -> tuple[dict[str, Any], str]:
    """The outcome, and the traceback of an error."""
    try:
        make_cwd_importable()
        if slurm and not is_replica():
            record_slurm_restart(run)
        summary = training.train(load_config(run), run, resume=was_started(run), stop=stop)
    except KeyboardInterrupt:
        return {"status": "stopped"}, ""
    except (Exception, SystemExit) as failure:  # noqa: BLE001  every error is reported
        return _describe(failure), traceback.format_exc()
    return {"status": str(summary.get("status", "finished")), "summary": summary}, ""


def _describe(failure: BaseException) -> dict[str, Any]:
    """The error in a few lines; the package's own messages are complete, others need the type and the place."""
    text = str(failure).strip() or "no message"
    if is_ours(failure):
        bad_input = isinstance(failure, ConfigurationError)
        return {"status": status_of(failure), "error": text, "bad_input": bad_input}
    lines = text.splitlines()
    shown = "\n".join(lines[:4]) + (f"\n({len(lines) - 4} more lines in the log)" if len(lines) > 4 else "")
    frames = traceback.extract_tb(failure.__traceback__)
    where = f" (raised in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return {"status": "failed", "error": f"{type(failure).__name__}: {shown}{where}", "bad_input": False}


def _tell(run: Path, outcome: dict[str, Any], file: Path) -> None:
    """Writes the outcome to the run's summary and to the outcome file."""
    try:
        set_status(run, outcome["status"])
    except OSError as unwritten:  # for example a full disk, which may hold the log too
        with contextlib.suppress(OSError):
            sys.stderr.write(f"summary.json could not be written ({unwritten}); its status is unchanged\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A terminal that follows the job shows the log up to here; the traceback after it is only in the file.
    outcome["log_end"] = os.fstat(1).st_size
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps(outcome, default=str))


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirect stdout and stderr to ``log`` at the level of file descriptors, which includes output of C libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for source, target in zip(kept, (1, 2), strict=True):
            os.dup2(source, target)
            os.close(source)


def restore_cuda() -> None:
    """Restores the user's ``CUDA_VISIBLE_DEVICES``: submitit's local executor hides all GPUs that are not requested."""
    if CUDA_VARIABLE in os.environ:
        visible = os.environ.pop(CUDA_VARIABLE)
        if visible == "unset":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
