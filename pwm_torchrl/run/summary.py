"""The result of a run in ``summary.json``, and the end of a run.

At the end of a run, its error is classified, its outcome is recorded, and everything that was opened is closed.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError, OutOfMemory, StorageFault, is_ours, status_of
from pwm_torchrl.files import is_storage_error, read_object, storage_faults
from pwm_torchrl.run.artifacts import write_summary
from pwm_torchrl.run.claims import RunClaim
from pwm_torchrl.run.directory import git_commit, versions, write_event
from pwm_torchrl.terminal import warn

# The result so far ----------------------------------------------------------------------------------------------------


#: Keys of ``summary.json`` that training updates.
PROGRESS = (
    "epochs_done", "agent_steps", "env_steps", "peak_return", "final_return", "final_return_std", "validation_loss",
    "best_validation_loss", "resume_exact"
)  # fmt: skip


@dataclass
class RunSummary:
    """Content of ``summary.json``; see :meth:`as_dict` for the keys."""

    run_dir: Path
    fixed: dict[str, Any]
    epochs_done: int = 0
    agent_steps: int = 0
    env_steps: int = 0
    peak_return: float | None = None
    final_return: float | None = None
    final_return_std: float | None = None
    random_return: float | None = None
    validation_loss: float | None = None  # of pre-training
    best_validation_loss: float | None = None
    resume_exact: bool = True
    restarts: int = 0
    earlier_s: float = 0.0
    earlier_host_bytes: int = 0  # peaks of earlier attempts
    earlier_device_bytes: int = 0
    earlier_own_bytes: int = 0
    own_bytes: int = 0  # peak of this attempt
    wandb_url: str | None = None  # of a run that logs online
    status: str = "running"
    earlier_status: str | None = None  # how the attempt before this one ended
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, cfg: Config, run_dir: Path, resume: bool) -> RunSummary:
        """Create a summary and write it; a resumed run starts from its file, with one more restart."""
        summary = cls(
            run_dir,
            {
                "model": cfg.model.name,
                "size": cfg.size.name,
                "env": cfg.env.get("name", cfg.env.get("_target_")),
                "seed": cfg.seed,
                "epochs_planned": cfg.training.epochs,
                "git_commit": git_commit(),
                "versions": versions(),
            },
        )
        if resume:
            before = read_object(run_dir / "summary.json")  # empty if damaged; the checkpoint restores the progress
            summary.restarts = int(_number(before, "restarts") or 0) + 1
            summary.random_return = _number(before, "random_return")
            summary.earlier_host_bytes = int(_number(before, "peak_host_bytes") or 0)
            summary.earlier_device_bytes = int(_number(before, "peak_device_bytes") or 0)
            summary.earlier_own_bytes = int(_number(before, "peak_own_bytes") or 0)
            url = before.get("wandb_url")
            summary.wandb_url = url if isinstance(url, str) else None
            # Keep the values of the file until a checkpoint is restored.
            summary.earlier_s = float(_number(before, "wall_clock_s") or 0.0)
            for key in PROGRESS:
                known = _number(before, key)
                if known is not None:
                    setattr(summary, key, known)
            said = before.get("status")
            summary.earlier_status = "stopped" if said in (None, "running") else str(said)
        summary.write()
        return summary

    def begin_again(self) -> None:
        """Reset the progress of earlier attempts, because there was no checkpoint to resume from."""
        for spec in fields(self):
            if spec.name in (*PROGRESS, "earlier_s"):
                setattr(self, spec.name, spec.default)

    def evaluated(self, mean: float, std: float) -> None:
        """Record the mean and standard deviation of an evaluation's returns."""
        self.final_return, self.final_return_std = mean, std
        self.peak_return = mean if self.peak_return is None else max(self.peak_return, mean)

    def validated(self, loss: float) -> None:
        """Record the loss of a validation."""
        self.validation_loss = loss
        self.best_validation_loss = min(loss, loss if self.best_validation_loss is None else self.best_validation_loss)

    @property
    def wall_clock_s(self) -> float:
        """Seconds of this attempt and of earlier ones, up to the checkpoints from which they were resumed."""
        return self.earlier_s + time.monotonic() - self.started

    def as_dict(self) -> dict[str, Any]:
        """The content of ``summary.json``; returns are sums of the environment's rewards, memory is in bytes.

        ``peak_host_bytes`` is the resident memory of the main process, including mapped files. ``peak_own_bytes`` is
        the anonymous and shared memory of all processes of the run during training, sampled once a second.
        """
        return {
            **{key: self.fixed[key] for key in ("model", "size", "env", "seed")},
            "status": self.status,
            "epochs_done": self.epochs_done,
            "epochs_planned": self.fixed["epochs_planned"],
            "agent_steps": self.agent_steps,
            "env_steps": self.env_steps,
            "peak_return": self.peak_return,
            "final_return": self.final_return,
            "final_return_std": self.final_return_std,
            "random_return": self.random_return,
            **self._validation(),
            "wall_clock_s": round(self.wall_clock_s, 1),
            "peak_host_bytes": max(self.earlier_host_bytes, peak_host_bytes()),
            "peak_own_bytes": max(self.earlier_own_bytes, self.own_bytes),
            "peak_device_bytes": max(self.earlier_device_bytes, peak_device_bytes()),
            "restarts": self.restarts,
            "resume_exact": self.resume_exact,
            **({} if self.wandb_url is None else {"wandb_url": self.wandb_url}),
            **{key: self.fixed[key] for key in ("git_commit", "versions", "hardware") if key in self.fixed},
        }

    def _validation(self) -> dict[str, float | None]:
        if self.validation_loss is None:
            return {}
        return {"validation_loss": self.validation_loss, "best_validation_loss": self.best_validation_loss}

    def write(self) -> dict[str, Any]:
        """Write ``summary.json``."""
        content = self.as_dict()
        write_summary(self.run_dir, content)
        return content

    def finish(self, status: str) -> dict[str, Any]:
        """Set the final status and write ``summary.json``."""
        self.status = status
        return self.write()

    def state_dict(self) -> dict[str, Any]:
        """The values that a resumed run continues from."""
        values = asdict(self)
        for key in (
            "run_dir",
            "fixed",
            "status",
            "earlier_status",
            "started",
            "restarts",
            "random_return",
            "wandb_url",
            "earlier_host_bytes",
            "earlier_device_bytes",
            "earlier_own_bytes",
            "own_bytes",
        ):
            del values[key]
        return {**values, "earlier_s": self.wall_clock_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, value in state_dict.items():
            setattr(self, key, value)
        self.started = time.monotonic()


def _number(content: dict[str, Any], key: str) -> Any:
    """The value of a key if it is a finite number or a boolean, else ``None``."""
    value = content.get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def peak_device_bytes() -> int:
    """Highest memory allocated on any CUDA device so far, 0 without one."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def peak_host_bytes() -> int:
    """Highest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# The end --------------------------------------------------------------------------------------------------------------


class Closing:
    """Closes everything in reverse order at the end of the block, also after an error; errors of closing are warnings.

    Examples:
        >>> from pwm_torchrl.run.summary import Closing
        >>> with Closing() as closing:
        ...     closing.later("file", lambda: None)
    """

    def __init__(self) -> None:
        self._later: list[tuple[str, Callable[[], object]]] = []

    def later(self, what: str, close: Callable[[], object]) -> None:
        """Register ``close`` to be called at the end; ``what`` names it in a warning."""
        self._later.append((what, close))

    def __enter__(self) -> Closing:
        return self

    def __exit__(self, *error: object) -> None:
        while self._later:
            what, close = self._later.pop()
            try:
                close()
            except Exception as failure:  # noqa: BLE001 - it must not hide the error that ended the run
                text = " ".join(str(failure).split())[:200] or type(failure).__name__
                warn(f"closing {what} failed: {text}")


def record_end(run_dir: Path, claim: RunClaim, summary: RunSummary | None, error: BaseException) -> None:
    """Record how the run ended; if this cannot be written, warn.

    A ConfigurationError in a later attempt does not fail the run: its status stays that of the earlier attempt.
    """
    if claim.gone:  # the directory does not exist any more
        return
    status = status_of(error)
    epoch = 0 if summary is None else summary.epochs_done
    claim.outcome = {"status": status, "epoch": epoch, "error": f"{type(error).__name__}: {error}"}
    refused = isinstance(error, ConfigurationError) and summary is not None and summary.earlier_status is not None
    try:
        if summary is not None and status != "superseded":  # otherwise the summary belongs to the newer attempt
            summary.finish(str(summary.earlier_status) if refused else status)
        write_event(run_dir, "refused" if refused else status, epoch=epoch, error=f"{type(error).__name__}: {error}")
    except OSError as unwritten:
        warn(f"the run ended with status {status}, which could not be written to {run_dir}: {unwritten}")


def named(error: BaseException, run_dir: Path) -> BaseException:
    """Converts an error to :class:`StorageFault` or :class:`OutOfMemory` if a disk failed or memory ran out.

    All errors that end a run are classified here. The package's own errors, and all others, are returned unchanged.

    Args:
        error (BaseException): the exception that ended the run.
        run_dir (Path): the run's directory, which the message names if ``error`` names no file.
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
            f"Memory ran out in a place where smaller micro-batches do not help ({message}). Give the run more "
            "memory, fewer environments (env.num_envs) or a replay on disk (training.replay_storage=disk), then resume "
            "it from its last checkpoint."
        )
    return error


def _storage_fault(error: OSError, run_dir: Path) -> BaseException:
    path = Path(error.filename) if isinstance(error.filename, str) else run_dir
    try:
        with storage_faults(path, "write"):
            raise error
    except StorageFault as fault:
        return fault
