"""How a run ends: errors get their names, the end is written down, everything is closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.errors import ConfigurationError, OutOfMemory, StorageFault, is_ours, status_of
from pwm_torchrl.files import is_storage_error, storage_faults
from pwm_torchrl.run.claims import RunClaim
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.run.summary import RunSummary
from pwm_torchrl.terminal import warn


class Closing:
    """Closes everything that was opened, in reverse order, whatever happened; what fails meanwhile is a warning.

    Examples:
        >>> from pwm_torchrl.run.ending import Closing
        >>> with Closing() as closing:
        ...     closing.later("file", lambda: None)
    """

    def __init__(self) -> None:
        self._later: list[tuple[str, Callable[[], object]]] = []

    def later(self, what: str, close: Callable[[], object]) -> None:
        """Call ``close`` at the end."""
        self._later.append((what, close))

    def __enter__(self) -> Closing:
        return self

    def __exit__(self, *error: object) -> None:
        while self._later:
            what, close = self._later.pop()
            try:
                close()
            except Exception as failure:  # noqa: BLE001 - it must not hide what ended the run
                text = " ".join(str(failure).split())[:200] or type(failure).__name__
                warn(f"closing {what} failed: {text}")


def record_end(run_dir: Path, claim: RunClaim, summary: RunSummary | None, error: BaseException) -> None:
    """Write how the run ended; where that fails too, stderr says so and the error is raised all the same.

    An attempt that was refused (its configuration or its surroundings cannot work, and it says what would) has not
    failed what an earlier one trained: the run is as that one left it.
    """
    if claim.gone:  # there is nothing to write to
        return
    status = status_of(error)
    epoch = 0 if summary is None else summary.epochs_done
    claim.outcome = {"status": status, "epoch": epoch, "error": f"{type(error).__name__}: {error}"}
    refused = isinstance(error, ConfigurationError) and summary is not None and summary.earlier_status is not None
    try:
        if summary is not None and status != "superseded":  # or the summary is the successor's
            summary.finish(str(summary.earlier_status) if refused else status)
        write_event(run_dir, "refused" if refused else status, epoch=epoch, error=f"{type(error).__name__}: {error}")
    except OSError as unwritten:
        warn(f"the run ended with status {status}, which could not be written to {run_dir}: {unwritten}")


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
