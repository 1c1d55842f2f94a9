"""What happens around the updates of an epoch: replay is filled, results are evaluated, logged and shown."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torchrl.record.loggers.common import Logger

from pwm_torchrl.errors import DivergenceError
from pwm_torchrl.memory.guard import Alarm
from pwm_torchrl.training.metrics import CsvMetrics, MetricRow
from pwm_torchrl.training.model_stepper import ModelStepper
from pwm_torchrl.training.run_memory import RunMemory

if TYPE_CHECKING:
    from pwm_torchrl.training.base_run import BaseRun
    from pwm_torchrl.training.trainer import PWMTrainer


class Observer:
    """Logs what every run has; subclasses receive data and evaluate.

    Args:
        run (BaseRun): the run's parts.
        stepper (ModelStepper): its updates.
    """

    trainer: PWMTrainer
    evaluating = "evaluating"  # what :meth:`evaluate` does, in words

    def __init__(self, run: BaseRun, stepper: ModelStepper) -> None:
        self.run, self.stepper = run, stepper
        self.csv = CsvMetrics(run.run_dir / "metrics.csv")
        self.logger: Logger | None = None
        self.memory = RunMemory(run.cfg.memory, run.memory_unwatched)
        self.alarm: Alarm | None = None  # memory is short: the run stops after this epoch
        self.epoch_started = time.monotonic()

    def receive(self, batch: TensorDictBase) -> TensorDictBase:
        """What the trainer's source gave."""
        self.run.claim.check()  # before anything is written to files that a successor may own
        return batch

    def evaluate(self, row: MetricRow) -> None:
        """Measure what has been learned, into ``row`` and the summary."""
        raise NotImplementedError

    def profile(self, row: MetricRow) -> None:
        """Measure gradients, into ``row``."""

    def open(self, restored: bool) -> None:
        """Drop metric rows that the run will write again, and tell how far the run has come."""
        self.csv.truncate(self.trainer.logged_epoch if restored else 0)
        self.run.summary.resume_exact &= self.trainer.collector.resumed_exactly
        trainer, summary = self.trainer, self.run.summary
        all_steps = trainer.total_frames if trainer.steps_per_epoch else 0
        values = {"return": summary.final_return, "best": summary.peak_return, "validation": summary.validation_loss}
        self.run.progress.begin(
            self.run.cfg.training.epochs, trainer.logged_epoch, trainer.env_steps, all_steps, known(values)
        )
        self.epoch_started = time.monotonic()

    def finish_epoch(self, epoch: int, row: MetricRow) -> None:
        """Evaluate if it is due, then log the epoch."""
        t = self.run.cfg.training
        due = (t.eval_every > 0 and epoch % t.eval_every == 0) or epoch >= t.epochs
        # A diverged policy is not evaluated: the environment would be blamed for its actions.
        healthy = not_finite(row.numbers()) is None
        if healthy and (due or self.trainer._stop_training):
            with self.run.progress.phase(self.evaluating):
                self.evaluate(row)
        profiled = t.gradient_profile_every and epoch % t.gradient_profile_every == 0
        if healthy and profiled and self.stepper.updated:
            self.profile(row)
        now = time.monotonic()
        row.set({"time/epoch_s": now - self.epoch_started})
        self.epoch_started = now
        row.set(self.memory.metrics())
        self.run.summary.own_bytes = self.memory.peak_own
        self.log(epoch, row.numbers())
        if due:
            self.run.summary.write()
        self.check_memory(epoch)

    def check_memory(self, epoch: int) -> None:
        """Ask for a stop, with a checkpoint, if memory is about to run out and training is not over."""
        alarm = self.memory.check(warm=self.stepper.updated)
        if alarm is not None and epoch < self.run.cfg.training.epochs and not self.trainer._stop_training:
            self.alarm = alarm
            self.trainer.request_stop("memory")

    def log(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the epoch everywhere; raise if the training diverged.

        Raises:
            DivergenceError: if a loss or gradient norm is not finite.
        """
        summary = self.run.summary
        summary.epochs_done = epoch
        summary.agent_steps, summary.env_steps = self.trainer.agent_steps, self.trainer.env_steps
        heads = {
            "epoch": epoch,
            "agent_steps": self.trainer.agent_steps,
            "env_steps": self.trainer.env_steps,
            "wall_clock_s": round(summary.wall_clock_s, 3),
        }
        self.csv.write({**heads, **numbers})
        if self.logger is not None:
            for name, value in {**heads, **numbers}.items():
                self.logger.log_scalar(name, value, step=self.trainer.log_step)
        trained = numbers.get("train/return")
        shown = {
            # Evaluations are with the policy's mean, training with its noise: once there is one, that is the return.
            "return": summary.final_return if summary.final_return is not None else trained,
            "best": summary.peak_return,
            "validation": summary.validation_loss,
            "training return": trained if summary.final_return is not None else None,
            "model loss": numbers.get("loss/model"),
            "actor loss": numbers.get("loss/actor"),
            "critic loss": numbers.get("loss/value"),
        }
        self.run.progress.epoch(epoch, self.trainer.env_steps, known(shown), typical=self.stepper.updated)
        bad = not_finite(numbers)
        if bad is not None:
            raise DivergenceError(
                f"{bad} became {numbers[bad]} in epoch {epoch}; the checkpoint before it is the newest. Lower the "
                "learning rates (algorithm.*_lr) or normalise rewards (algorithm.normalize_rewards=true)."
            )

    def close(self) -> None:
        """Close the metrics file; training is over."""
        self.run.summary.own_bytes = self.memory.peak_own
        self.csv.close()


def known(values: dict[str, float | None]) -> dict[str, float]:
    """Those of some values that there are."""
    return {name: value for name, value in values.items() if value is not None}


def not_finite(numbers: dict[str, float]) -> str | None:
    """The first loss or gradient norm that is NaN or infinite."""
    watched = (name for name in numbers if name.startswith(("loss/", "grad_norm/")))
    return next((name for name in watched if not math.isfinite(numbers[name])), None)
