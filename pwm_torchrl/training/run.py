"""A run, from its configuration to its summary."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pwm_torchrl.data.files import Reserve
from pwm_torchrl.errors import ConfigurationError, status_of
from pwm_torchrl.training.assembly import Run
from pwm_torchrl.training.base_run import BaseRun
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.claims import RunClaim, claimed
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.config_file import save_config
from pwm_torchrl.training.distributed import Ranks, joined
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.extraction import ExtractRun
from pwm_torchrl.training.failpoints import failpoint
from pwm_torchrl.training.faults import named
from pwm_torchrl.training.pretraining import PretrainRun
from pwm_torchrl.training.progress import warn
from pwm_torchrl.training.replica import check_device, serve
from pwm_torchrl.training.stop import StopRequest
from pwm_torchrl.training.summary import RunSummary


def train(cfg: Config, run_dir: Path | str, resume: bool = False, stop: StopRequest | None = None) -> dict[str, Any]:
    """Train what a configuration describes to its end, or to a stop.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): where everything is written; exists.
        resume (bool): continue from the newest readable checkpoint, or start again if there is none.
            Defaults to ``False``.
        stop (StopRequest, optional): asks the run to stop at its next step, in the middle of an epoch if need be.
            Defaults to ``None``: nobody does.

    Returns:
        dict: the summary that ``summary.json`` holds too. SIGINT ends the run after the epoch, a stop request after the
        step, with status ``stopped`` and a checkpoint. Where a launcher started several processes, each of which calls
        this, only rank 0 does any of that; the others compute shares of its updates and return ``rank`` and ``status``.

    Raises:
        ConfigurationError: for a configuration that cannot work.
        EnvironmentFault: if an environment fails, after a checkpoint.
        DivergenceError: if a loss is not finite; the last checkpoint stays the newest.
        OutOfMemory: if an update does not fit into memory even in parts of 1, or memory is about to run out, after a
            checkpoint; if memory runs out elsewhere, with the last checkpoint as the newest. Status ``memory``.
        RankFault: if another of several processes fails or is gone; the last checkpoint stays the newest.
        StorageFault: if the disk is full, over its quota or broken; the last checkpoint stays the newest. Status
            ``storage``.
        Superseded: if another attempt has taken the run over; it is left to that one.
    """
    run_dir = Path(run_dir)
    quiet_torchrl()
    try:
        with joined() as ranks:
            if ranks is not None and not ranks.leads:
                if stop is not None:
                    stop.reached.set()  # its signals are for rank 0 to answer: no step of this process ends on them
                return {"rank": ranks.rank, "status": serve(ranks)}
            with claimed(run_dir, CheckpointStore(run_dir).names()) as claim:
                failpoint("start.claimed")
                result = _train(cfg, run_dir, claim, resume, stop, ranks)
            if ranks is not None:
                ranks.status = result["status"]
            return result
    except OSError as error:  # of the claim; all others have their names
        fault = named(error, run_dir)
        if fault is error:
            raise
        raise fault from error


def _train(
    cfg: Config, run_dir: Path, claim: RunClaim, resume: bool, stop: StopRequest | None, ranks: Ranks | None
) -> dict[str, Any]:
    summary: RunSummary | None = None
    reserve = Reserve(run_dir)
    try:
        reserve.take()
        save_config(cfg, run_dir)
        summary = RunSummary.start(cfg, run_dir, resume)
        if ranks is not None:
            check_device(cfg.device, ranks)
        run = kind_of_run(cfg)(cfg, run_dir, summary, claim, resume, stop, ranks)
        with run.memory_plan.compared():
            status = run.execute(resume)
        claim.check()
        failpoint("finish.summary")
        result = summary.finish(status)
        made = run.observer.stepper.made
        claim.outcome = {"status": status, "epoch": summary.epochs_done, "reason": run.stop.reason, "updates": made}
        write_event(run_dir, status, epoch=summary.epochs_done)
        run.draw()
        run.close()
    except BaseException as error:
        fault = named(error, run_dir)
        reserve.free()
        _record_end(run_dir, claim, summary, fault)
        if fault is error:
            raise
        raise fault from error
    finally:
        reserve.free()
    failpoint("finish.outcome")
    return result


def kind_of_run(cfg: Config) -> type[BaseRun]:
    """The class of a configuration's mode.

    Raises:
        ConfigurationError: for an unknown one.
    """
    kinds: dict[str, type[BaseRun]] = {"online": Run, "pretrain": PretrainRun, "extract": ExtractRun}
    if cfg.mode not in kinds:
        raise ConfigurationError(f"mode={cfg.mode!r} is not one of {', '.join(kinds)}.")
    return kinds[cfg.mode]


def _record_end(run_dir: Path, claim: RunClaim, summary: RunSummary | None, error: BaseException) -> None:
    """Write how the run ended; where that fails too, stderr says so and the error is raised all the same."""
    status = status_of(error)
    epoch = 0 if summary is None else summary.epochs_done
    claim.outcome = {"status": status, "epoch": epoch, "error": f"{type(error).__name__}: {error}"}
    try:
        if summary is not None and status != "superseded":  # or the summary is the successor's
            summary.finish(status)
        write_event(run_dir, status, epoch=epoch, error=f"{type(error).__name__}: {error}")
    except OSError as unwritten:
        warn(f"the run ended with status {status}, which could not be written to {run_dir}: {unwritten}")


def quiet_torchrl() -> None:
    """Keep TorchRL's informational messages out of the progress display, unless RL_LOGGING_LEVEL asks for a level."""
    if "RL_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("torchrl").setLevel(logging.WARNING)
