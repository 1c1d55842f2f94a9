"""One epoch's updates: world model, then policy, then critics."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers.trainers import OptimizationStepper, Trainer

from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.modules import RewardScale
from pwm_torchrl.training.build import Learner, Losses, Networks
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.metrics import MetricRow

POLICY_STARTS = ("replay", "current")


class PWMStepper(OptimizationStepper):
    """The updates of one epoch of PWM on a collected batch (https://arxiv.org/abs/2407.02466, algorithm 1).

    Args:
        cfg (Config): the run's configuration.
        networks (Networks): what is trained.
        losses (Losses): the objectives around ``networks``.
        learners (dict of Learner): optimizers by network name.
        replay (TrajectoryReplay): source of slices and start states.
        reward_scale (RewardScale, optional): divides rewards before the model sees them.
        first_model_updates (int): world-model updates of the first training epoch.
    """

    def __init__(
        self,
        cfg: Config,
        networks: Networks,
        losses: Losses,
        learners: dict[str, Learner],
        replay: TrajectoryReplay,
        reward_scale: RewardScale | None,
        first_model_updates: int,
    ) -> None:
        self.cfg = cfg
        self.networks = networks
        self.losses = losses
        self.learners = learners
        self.replay = replay
        self.reward_scale = reward_scale
        self.first_model_updates = first_model_updates
        self.epoch = 0  # training epochs done
        self.updated = False  # whether the world model has had its first updates

    def step(self, trainer: Trainer | None, sub_batch: TensorDictBase) -> TensorDictBase:
        """Run one epoch's updates after collecting ``sub_batch`` ``[N, T]``; returns detached scalars."""
        a = self.cfg.algorithm
        row = MetricRow()
        if trainer is not None:
            # TorchRL's Trainer skips the updates while actions are random; the schedule counts those epochs too.
            self.epoch = trainer.epoch
        for name, learner in self.learners.items():
            learner.set_progress(self.epoch / max(1, self.cfg.training.epochs - 1))
            row.set({f"lr/{name}": learner.optimizer.param_groups[0]["lr"]})
        self.epoch += 1
        if self.replay.collected < a.random_steps or not self.replay.can_sample:
            return TensorDict(row.numbers())
        for _ in range(a.model_updates if self.updated else self.first_model_updates):
            self.update_model(row)
        self.updated = True
        for _ in range(a.policy_updates):
            imagined = self.update_policy(self.start_observations(sub_batch), row)
            self.update_critics(imagined, row)
        return TensorDict(row.numbers())

    def update_model(self, row: MetricRow) -> None:
        """One world-model update on replayed slices, accumulated over micro-batches."""
        loss = self.losses.model
        batch = self.replay.sample_slices(self.cfg.algorithm.model_batch)
        if self.reward_scale is not None:
            reward = batch["next", "reward"]
            batch["next", "reward"] = self.reward_scale(reward)
        slices = loss.read(batch)
        noise = loss.draw_noise(slices)
        counts = slices.valid_counts()
        size = self.cfg.memory.model_micro_batch or batch.shape[0]
        total: dict[str, Tensor] = {}
        for first in range(0, batch.shape[0], size):
            rows = slice(first, first + size)
            losses = loss.evaluate(slices.rows(rows), None if noise is None else noise.rows(rows), counts)
            sum(losses.values()).backward()
            for key, value in losses.items():
                total[key] = total.get(key, 0) + value.detach()
        row.mean({"loss/model": sum(total.values())})
        row.mean({key.replace("loss_", "loss/model_"): value for key, value in total.items()})
        row.mean({"grad_norm/model": self.learners["world_model"].step()})
        row.mean({"data/valid_fraction": slices.valid.float().mean()})

    @torch.no_grad()
    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """Observations ``[imagination_batch, O]`` from which to imagine, replayed or of this epoch's batch."""
        count = self.cfg.algorithm.imagination_batch
        if self.cfg.algorithm.policy_starts == "replay":
            return self.replay.sample_observations(count)
        current = batch.get("observation").flatten(0, 1).to(self.replay.device)
        return current[torch.randperm(len(current), device=current.device)[:count]]

    def encode(self, observation: Tensor) -> TensorDictBase:
        """Start latents without gradient."""
        with torch.no_grad():
            latent = self.networks.world_model.encode(observation)
        return TensorDict(latent=latent, batch_size=latent.shape[:1])

    def update_policy(self, observation: Tensor, row: MetricRow) -> TensorDictBase:
        """One policy update; returns the detached rollout ``[B, H]``."""
        losses, imagined = self.losses.actor.rollout_and_loss(self.encode(observation))
        losses["loss_actor"].backward()
        norm = self.learners["actor"].step()
        named = {"loss/actor": losses["loss_actor"].detach(), "grad_norm/actor": norm}
        for key in ("imagined_return", "imagined_reward", "return_std", "terminated"):
            named[f"imagination/{key.removeprefix('imagined_')}"] = losses[key]
        row.mean(named)
        std = self.networks.actor.log_std.detach().clamp_min(self.networks.actor.log_std_min).exp()
        row.set({"policy/std": std.mean()})
        return imagined

    def update_critics(self, imagined: TensorDictBase, row: MetricRow) -> None:
        """Shuffled passes over a rollout's states in minibatches."""
        a = self.cfg.algorithm
        keys = self.losses.value.tensor_keys
        states = imagined.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()
        size = math.ceil(len(states) / a.critic_minibatches)
        for _ in range(a.critic_passes):
            for rows in torch.randperm(len(states), device=states.device).split(size):
                losses = self.losses.value(states[rows])
                losses["loss_value"].backward()
                norm = self.learners["critics"].step()
                row.mean({"loss/value": losses["loss_value"].detach(), "grad_norm/value": norm})
        row.set({"critic/value": losses["value"]})

    def gradient_profile(self, observation: Tensor) -> dict[str, float]:
        """Norm of the policy objective's gradient with respect to the action of every horizon step, batch mean."""
        start = self.encode(observation)["latent"]
        rollout, next_value = self.losses.actor.imagine(start)
        returns = self.losses.actor.returns(rollout, next_value)
        gradient = torch.autograd.grad(returns.mean(), rollout.actions)
        return {f"grad_profile/{t:02d}": g.norm(dim=-1).sum().item() for t, g in enumerate(gradient)}

    def state_dict(self) -> dict[str, object]:
        """Counters; networks and optimizers are checkpoint components of their own."""
        return {"epoch": self.epoch, "updated": self.updated}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.epoch = int(state_dict["epoch"])  # type: ignore[call-overload]
        self.updated = bool(state_dict["updated"])
