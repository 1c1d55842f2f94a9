"""The function that a SLURM job runs: a run, told nothing but its directory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pwm_torchrl.distributed.rendezvous import is_replica
from pwm_torchrl.errors import is_ours, status_of
from pwm_torchrl.files import write_durably
from pwm_torchrl.run.stop import StopRequest, stop_on_signals

LOG_FILE = "log.txt"


class JobFailed(RuntimeError):
    """Marks the job as failed for submitit; the reason is in the run's directory."""


def run_slurm_job(run_dir: str) -> str:
    """Train the run that a directory describes.

    SIGUSR2 and SIGTERM stop it at its next step; if it reaches none in half of the time that SLURM gives, the process
    ends and the run continues from its last checkpoint. What happens then is decided by the batch script.

    Args:
        run_dir (str): absolute path of a prepared run directory.

    Returns:
        str: the status of the attempt.

    Raises:
        JobFailed: if it did not end in order.
    """
    run, stop = Path(run_dir), StopRequest()
    rank = int(os.environ.get("SLURM_PROCID", "0"))  # one without several tasks, too
    with (
        output_to(run / (LOG_FILE if rank == 0 else f"log_rank{rank}.txt")),
        stop_on_signals(stop, _deadline(run), ignore_afterwards=True),
    ):
        try:
            return _train(run, stop)
        except (Exception, SystemExit) as failure:
            if not is_ours(failure):
                traceback.print_exc()
            else:
                sys.stderr.write(f"error: {failure}\n")
            if not is_replica():
                _write_error(run, failure)
            raise JobFailed(f"{type(failure).__name__}: {failure}") from failure


def _train(run: Path, stop: StopRequest) -> str:
    from pwm_torchrl.cluster.restarts import before_training
    from pwm_torchrl.run.directory import load_config, was_started
    from pwm_torchrl.training import train

    if not is_replica():
        before_training(run)
    summary = train(load_config(run), run, resume=was_started(run), stop=stop)
    return str(summary["status"])


def _deadline(run: Path) -> float | None:
    """Half of the profile's signal delay, in seconds."""
    from pwm_torchrl.run.directory import load_config

    return load_config(run).cluster.signal_delay_s / 2


def _write_error(run: Path, failure: BaseException) -> None:
    """For the batch script, in case the attempt could not say itself how it ended."""
    from pwm_torchrl.cluster.restarts import Life

    place = Life.here().error_file(run)
    content: dict[str, Any] = {"status": status_of(failure), "error": f"{type(failure).__name__}: {failure}"}
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_durably(place, json.dumps(content))


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
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
