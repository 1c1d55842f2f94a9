"""What happens around the updates of an epoch: replay is filled, results are evaluated, logged and shown."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torchrl.record.loggers.common import Logger

from pwm_torchrl.errors import DivergenceError
from pwm_torchrl.memory.guard import Alarm
from pwm_torchrl.training.collector import EpisodeReturns
from pwm_torchrl.training.evaluation import open_loop_errors, play
from pwm_torchrl.training.metrics import CsvMetrics, MetricRow
from pwm_torchrl.training.progress import Progress
from pwm_torchrl.training.run_memory import RunMemory
from pwm_torchrl.training.seeding import evaluation_env_seed
from pwm_torchrl.training.stepper import PWMStepper

if TYPE_CHECKING:
    from pwm_torchrl.training.assembly import Run
    from pwm_torchrl.training.trainer import PWMTrainer


class Observer:
    """Hooks of a run.

    Args:
        run (Run): the run's parts.
        stepper (PWMStepper): its updates.
    """

    trainer: PWMTrainer
    returns: EpisodeReturns
    progress: Progress

    def __init__(self, run: Run, stepper: PWMStepper) -> None:
        self.run, self.stepper = run, stepper
        self.csv = CsvMetrics(run.run_dir / "metrics.csv")
        self.logger: Logger | None = None
        self.memory = RunMemory(run.cfg.memory, run.memory_unwatched)
        self.alarm: Alarm | None = None  # memory is short: the run stops after this epoch
        self.epoch_started = time.monotonic()

    def open(self, restored: bool) -> None:
        """Drop metric rows that the run will write again, and start the progress display."""
        self.csv.truncate(self.trainer.logged_epoch if restored else 0)
        self.run.summary.resume_exact &= self.trainer.collector.resumed_exactly
        t = self.run.cfg.training
        steps = self.trainer.collector.requested_frames_per_batch
        self.progress = Progress(t.epochs, self.trainer.logged_epoch, steps, t.progress)
        self.epoch_started = time.monotonic()

    def receive(self, batch: TensorDictBase) -> TensorDictBase:
        """A collected batch ``[N, T]``: into replay and the running statistics."""
        finished = self.returns.update(batch)
        if len(finished):
            self.trainer.row.set({"train/return": finished.mean(), "train/episodes": len(finished)})
        if self.run.reward_scale is not None:
            step = batch["next"].to(self.run.device)
            self.run.reward_scale.update(step["reward"], step["done"])
        statistics = self.run.networks.world_model.observation_statistics
        if statistics is not None:
            statistics.update(batch["observation"].to(statistics.mean.device))
        self.run.claim.check()  # before anything is written to files that a successor may own
        self.run.replay.extend(batch)
        return batch

    def finish_epoch(self, epoch: int, row: MetricRow) -> None:
        """Evaluate if it is due, then log the epoch."""
        t = self.run.cfg.training
        due = (t.eval_every > 0 and epoch % t.eval_every == 0) or epoch >= t.epochs
        # A diverged policy is not evaluated: the environment would be blamed for its actions.
        healthy = not_finite(row.numbers()) is None
        if healthy and (due or self.trainer._stop_training):
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

    def profile(self, row: MetricRow) -> None:
        """Gradient norm per horizon step; its random numbers are taken from nobody, so that logging changes nothing."""
        device = self.run.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # No more rollouts than an update back-propagates at once: that is what memory was planned for.
            count = self.stepper.micro_batches.size(
                "policy", self.stepper.share(self.run.cfg.algorithm.imagination_batch)
            )
            observation = self.run.replay.sample_observations(count)
            row.set(self.stepper.gradient_profile(observation))

    def evaluate(self, row: MetricRow) -> None:
        """Deterministic episodes in the evaluation environments, and the model's open-loop errors on them."""
        run = self.run
        episodes = play(run.eval_env, run.act, evaluation_env_seed(run.cfg.seed), self.trainer.stop.check)
        returns = episodes.returns
        mean, std = returns.mean().item(), returns.std(unbiased=False).item()
        row.set(
            {
                "eval/return_mean": mean,
                "eval/return_std": std,
                "eval/return_min": returns.min(),
                "eval/return_max": returns.max(),
            }
        )
        scale = None
        if run.reward_scale is not None:
            scale = run.reward_scale(torch.ones(1, device=run.device))
        errors = open_loop_errors(run.networks.world_model, episodes, run.cfg.algorithm.horizon, scale)
        row.set({f"eval/{key}": value for key, value in errors.items()})
        run.summary.evaluated(mean, std)
        self.trainer.evaluated = mean

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
                self.logger.log_scalar(name, value, step=self.trainer.env_steps)
        shown = {
            "return": numbers.get("eval/return_mean", numbers.get("train/return")),
            "model": numbers.get("loss/model"),
            "actor": numbers.get("loss/actor"),
            "value": numbers.get("loss/value"),
        }
        self.progress.update(epoch, {k: v for k, v in shown.items() if v is not None})
        bad = not_finite(numbers)
        if bad is not None:
            raise DivergenceError(
                f"{bad} became {numbers[bad]} in epoch {epoch}; the checkpoint before it is the newest. Lower the "
                "learning rates (algorithm.*_lr) or normalise rewards (algorithm.normalize_rewards=true)."
            )

    def close(self) -> None:
        """Close the metrics file and the progress display; training is over."""
        self.run.summary.own_bytes = self.memory.peak_own
        self.csv.close()
        self.progress.close()


def not_finite(numbers: dict[str, float]) -> str | None:
    """The first loss or gradient norm that is NaN or infinite."""
    watched = (name for name in numbers if name.startswith(("loss/", "grad_norm/")))
    return next((name for name in watched if not math.isfinite(numbers[name])), None)
