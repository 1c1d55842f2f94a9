"""The function that a job runs, on this machine or under SLURM, and the files in which it tells how that went.

A job is told nothing but its run directory. It writes its output to ``log.txt`` there and how it ended to a JSON file,
so that whoever waits for it needs no pickle and shows no pickle's traceback. Imports no torch: what trains is loaded in
the job.
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
from pwm_torchrl.cluster.deaths import Life, before_training
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
#: In the folder of an attempt on this machine.
OUTCOME_FILE = "outcome.json"
PID_FILE = "pid"
STATE_FILE = "progress.json"  # what the job is doing, where a terminal follows it
#: What ``CUDA_VISIBLE_DEVICES`` is for the user: submitit's local executor hides every GPU that is not asked for.
CUDA_VARIABLE = "PWM_TORCHRL_CUDA_VISIBLE_DEVICES"


class JobFailed(RuntimeError):
    """Marks the job as failed for submitit; the reason is in the outcome and in the log."""


def require_submitit() -> None:
    """Checks that jobs can be submitted.

    Raises:
        MissingLibraryError: if submitit, through which that is done, is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise MissingLibraryError(
            f"submitit is not installed; pip install 'pwm-torchrl[launch]', or use {named('train')}"
        )


@dataclass(frozen=True)
class _Surroundings:
    """What differs between a job of this machine and one of SLURM.

    Attributes:
        log (Path): where output goes; a file for each process.
        outcome (Path, optional): where it tells how it ended; ``None`` in a process that computes for another.
        deadline_s (float, optional): seconds from a signal in which a step must be reached.
    """

    log: Path
    outcome: Path | None
    deadline_s: float | None

    @classmethod
    def of_slurm(cls, run: Path) -> _Surroundings:
        """In a step of a SLURM job: half of the time that SLURM gives is for the last step."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))  # one without several tasks, too
        log = run / (LOG_FILE if rank == 0 else f"log_rank{rank}.txt")
        outcome = None if is_replica() else Life.here().outcome_file(run)
        return cls(log, outcome, load_config(run).cluster.signal_delay_s / 2)

    @classmethod
    def of_this_machine(cls, run: Path) -> _Surroundings:
        """In a process that submitit started here: in a session of its own, so that Ctrl-C reaches its follower alone
        and that can stop it in order; with the GPUs that the user sees.
        """
        attempt = Path(os.environ["SUBMITIT_FOLDER"])
        with contextlib.suppress(PermissionError):  # already the leader of a group of its own
            os.setsid()
        (attempt / PID_FILE).write_text(str(os.getpid()), encoding="utf-8")
        restore_cuda()
        return cls(run / LOG_FILE, attempt / OUTCOME_FILE, None)


def run_job(run_dir: str) -> dict[str, Any]:
    """Trains the run that a directory describes; what submitit calls in the job's process.

    SIGUSR2 and SIGTERM stop it at its next step. Under SLURM the process ends if it reaches none in half of the time
    that SLURM gives, and the run continues from its last checkpoint; the batch script decides what happens then.

    Args:
        run_dir (str): absolute path of a directory made by :func:`~pwm_torchrl.run.directory.prepare_run_dir`.

    Returns:
        dict: the outcome: ``status`` and, where they exist, ``summary``, ``error``, ``bad_input``, ``log_end``.

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
    """The outcome, and the traceback of what went wrong."""
    try:
        make_cwd_importable()
        if slurm and not is_replica():
            before_training(run)
        summary = training.train(load_config(run), run, resume=was_started(run), stop=stop)
    except KeyboardInterrupt:
        return {"status": "stopped"}, ""
    except (Exception, SystemExit) as failure:  # noqa: BLE001  whatever it is, it is reported
        return _describe(failure), traceback.format_exc()
    return {"status": str(summary.get("status", "finished")), "summary": summary}, ""


def _describe(failure: BaseException) -> dict[str, Any]:
    """The error in a few lines; our own messages stand for themselves, others need their type."""
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
    """Writes how the job ended into the run's summary and into a file of its own."""
    try:
        set_status(run, outcome["status"])
    except OSError as unwritten:  # the disk that ended the run, and that the log may lie on, too
        with contextlib.suppress(OSError):
            sys.stderr.write(f"summary.json could not be written ({unwritten}); its status stays as it was\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Followers show the log up to here; the traceback behind it is for those who open the file.
    outcome["log_end"] = os.fstat(1).st_size
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps(outcome, default=str))


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send stdout and stderr to ``log``, at the level of file descriptors: libraries written in C print too."""
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
    """Undoes that submitit's local executor hides every GPU that was not asked for by number."""
    if CUDA_VARIABLE in os.environ:
        visible = os.environ.pop(CUDA_VARIABLE)
        if visible == "unset":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
