"""What ended a run, in the package's own words, and what is saved then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pwm_torchrl.data.files import is_storage_error, storage_faults
from pwm_torchrl.errors import OutOfMemory, StorageFault, is_ours, status_of
from pwm_torchrl.terminal import warn
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.recovery import is_out_of_memory

if TYPE_CHECKING:
    from pwm_torchrl.training.trainer import PWMTrainer


def named(error: BaseException, run_dir: Path) -> BaseException:
    """The error that a run ends with: of memory or a disk that ran out, wherever that was, one of the package's own.

    This is the one place where they are told apart; what the package raised itself, and bugs, stay as they are.

    Args:
        error (BaseException): what was raised.
        run_dir (Path): the run's directory, of which an error that names no file tells.
    """
    if is_ours(error):
        return error
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and is_storage_error(link):
            return _storage_fault(link, run_dir)
        link = link.__cause__
    if isinstance(error, Exception) and is_out_of_memory(error):
        message = " ".join(str(error).split())[:300] or type(error).__name__
        return OutOfMemory(
            f"Memory ran out where no smaller micro-batch helps ({message}). Give the run more memory, fewer "
            "environments (env.num_envs) or a replay on disk (training.replay_storage=disk), then resume it from its "
            "last checkpoint."
        )
    return error


def _storage_fault(error: OSError, run_dir: Path) -> BaseException:
    path = Path(error.filename) if isinstance(error.filename, str) else run_dir
    try:
        with storage_faults(path, "write"):
            raise error
    except StorageFault as fault:
        return fault


def save_after_environment_fault(trainer: PWMTrainer) -> None:
    """Checkpoint of the last complete epoch; the faulty environments' state is left out, so episodes restart.

    If it was an evaluation that failed, training's environments are sound: the run goes on by evaluating again.
    """
    if trainer.inside_epoch:
        trainer.save_inside()
    elif trainer.epoch > 0:
        trainer.collector.forget_env_state()
        trainer.save_trainer(force_save=True)


def save_after_out_of_memory(trainer: PWMTrainer, run_dir: Path) -> None:
    """Checkpoint after an update that does not fit: it was taken back, so the run goes on from right before it."""
    if not trainer.inside_epoch:
        return
    try:
        trainer.save_inside()
    except Exception as error:
        fault = named(error, run_dir)
        if status_of(fault) == "failed":
            raise
        # What ended the run is told anyway; without memory or a disk there is no more to do about it.
        write_event(run_dir, "unsaved", epoch=trainer.epoch, error=str(fault))
        warn(f"no checkpoint after epoch {trainer.epoch}, those before it stay: {fault}")
