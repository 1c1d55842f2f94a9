"""The result of a run, kept up to date in ``summary.json``."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pwm_torchrl.config import Config
from pwm_torchrl.files import read_object
from pwm_torchrl.run.artifacts import write_summary
from pwm_torchrl.run.provenance import git_commit, versions

#: What training adds to, by the keys of ``summary.json``.
PROGRESS = (
    "epochs_done", "agent_steps", "env_steps", "peak_return", "final_return", "final_return_std", "validation_loss",
    "best_validation_loss", "resume_exact"
)  # fmt: skip


@dataclass
class RunSummary:
    """What ``summary.json`` says; see :meth:`as_dict` for the keys."""

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
        """A new summary, written at once; a resumed run counts one restart more than its file says."""
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
            before = read_object(run_dir / "summary.json")  # damaged: what it said comes back with the checkpoint
            summary.restarts = int(_number(before, "restarts") or 0) + 1
            summary.random_return = _number(before, "random_return")
            summary.earlier_host_bytes = int(_number(before, "peak_host_bytes") or 0)
            summary.earlier_device_bytes = int(_number(before, "peak_device_bytes") or 0)
            summary.earlier_own_bytes = int(_number(before, "peak_own_bytes") or 0)
            url = before.get("wandb_url")
            summary.wandb_url = url if isinstance(url, str) else None
            # Until a checkpoint is restored, what the file said stays true.
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
        """Forget the progress of earlier attempts: there was no checkpoint to continue from."""
        for spec in fields(self):
            if spec.name in (*PROGRESS, "earlier_s"):
                setattr(self, spec.name, spec.default)

    def evaluated(self, mean: float, std: float) -> None:
        """Enter an evaluation."""
        self.final_return, self.final_return_std = mean, std
        self.peak_return = mean if self.peak_return is None else max(self.peak_return, mean)

    def validated(self, loss: float) -> None:
        """Enter a validation."""
        self.validation_loss = loss
        self.best_validation_loss = min(loss, loss if self.best_validation_loss is None else self.best_validation_loss)

    @property
    def wall_clock_s(self) -> float:
        """Seconds of this attempt and of those before, up to the checkpoints they were resumed from."""
        return self.earlier_s + time.monotonic() - self.started

    def as_dict(self) -> dict[str, Any]:
        """The content of ``summary.json``; return in the environment's reward, memory in bytes.

        ``peak_host_bytes`` is resident memory of the main process, files it has mapped included; ``peak_own_bytes`` the
        anonymous and shared memory of all processes of the run while it trained, looked at once a second.
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
        """Write the last one."""
        self.status = status
        return self.write()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
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
    """A finite number of a file, or a truth; ``None`` where the key has anything else."""
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
