"""What happens around the updates of a run that collects: replay is filled, and the policy evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from pwm_torchrl.training.collector import EpisodeReturns
from pwm_torchrl.training.evaluation import open_loop_errors, play
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.observer import Observer
from pwm_torchrl.training.seeding import evaluation_env_seed
from pwm_torchrl.training.stepper import PWMStepper

if TYPE_CHECKING:
    from pwm_torchrl.training.assembly import PolicyRun, Run


class PolicyObserver(Observer):
    """Evaluates a policy and profiles its gradient.

    Args:
        run (PolicyRun): the run's parts.
        stepper (PWMStepper): its updates.
    """

    run: PolicyRun
    stepper: PWMStepper

    def profile(self, row: MetricRow) -> None:
        """Gradient norm per horizon step; its random numbers are taken from nobody, so that logging changes nothing."""
        device = self.run.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # No more rollouts than an update back-propagates at once: that is what memory was planned for.
            count = self.stepper.micro_batches.size(
                "policy", self.stepper.share(self.run.cfg.algorithm.imagination_batch)
            )
            observation = self.stepper.replay.sample_observations(count)
            row.set(self.stepper.gradient_profile(observation))

    def evaluate(self, row: MetricRow) -> None:
        """Deterministic episodes in the evaluation environments, and the model's open-loop errors on them."""
        run = self.run
        if run.eval_env is None:
            return
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
        if episodes.success is not None:
            row.set({"eval/success": episodes.success.float().mean()})
        scale = None
        if self.stepper.reward_scale is not None:
            scale = self.stepper.reward_scale(torch.ones(1, device=run.device))
        errors = open_loop_errors(run.networks.world_model, episodes, run.cfg.algorithm.horizon, scale)
        row.set({f"eval/{key}": value for key, value in errors.items()})
        run.summary.evaluated(mean, std)
        self.trainer.evaluated = mean


class OnlineObserver(PolicyObserver):
    """Fills the replay, too.

    Args:
        run (Run): the run's parts.
        stepper (PWMStepper): its updates.
        returns (EpisodeReturns): of training's episodes.
    """

    run: Run

    def __init__(self, run: Run, stepper: PWMStepper, returns: EpisodeReturns) -> None:
        super().__init__(run, stepper)
        self.returns = returns

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
        super().receive(batch)
        self.run.replay.extend(batch)
        return batch
