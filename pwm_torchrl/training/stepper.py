"""One epoch's updates: world model, then policy, then critics."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.training.build import Losses, Networks
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.model_stepper import EpochWork, ModelStepper

POLICY_STARTS = ("replay", "current")


class PWMStepper(ModelStepper):
    """The updates of one epoch of PWM on a collected batch (https://arxiv.org/abs/2407.02466, algorithm 1).

    Arguments as :class:`ModelStepper`'s, with networks and objectives of a policy.
    """

    networks: Networks
    losses: Losses

    def begin(self) -> EpochWork:
        """The work of a whole epoch."""
        a = self.cfg.algorithm
        if not self.sampling:
            return EpochWork(0, 0)
        if "world_model" not in self.learners:
            return EpochWork(0, a.policy_updates)
        return EpochWork(a.model_updates if self.updated else self.first_model_updates, a.policy_updates)

    def make_updates(self, work: EpochWork, sub_batch: TensorDictBase) -> None:
        """Do what is left, one update at a time."""
        super().make_updates(work, sub_batch)
        policy_updates = work.policy_updates
        while work.policy_updates or work.states is not None:
            self.stop.check()
            if work.states is None:
                if work.starts is None:
                    work.starts = self.start_observations(sub_batch)
                with self.progress.phase("improving the policy", policy_updates, policy_updates - work.policy_updates):
                    # The rollout has no other name than its states: it would live on beside the next policy update.
                    work.states = self.states_of(self.update_policy(work.starts, work.row))
                work.starts = None
                self.made += 1
                work.policy_updates -= 1
                work.passes = self.cfg.algorithm.critic_passes
            with self.progress.phase("fitting the critics"):
                self.continue_critics(work)

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
        undo = self.undo["actor"]

        def attempt(size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
            start = self.encode(observation)
            if self.shared is not None:
                return self.shared.policy(start, size)
            losses, imagined = self.losses.actor.backward(start, size)
            return losses, imagined, self.learners["actor"].step(undo.before_step)

        losses, imagined, norm = self.micro_batches.run("policy", self.share(len(observation)), undo, attempt)
        named = {"loss/actor": losses["loss_actor"], "grad_norm/actor": norm}
        for key in ("imagined_return", "imagined_reward", "return_std", "terminated"):
            named[f"imagination/{key.removeprefix('imagined_')}"] = losses[key]
        row.mean(named)
        std = self.networks.actor.log_std.detach().clamp_min(self.networks.actor.log_std_min).exp()
        row.set({"policy/std": std.mean()})
        return imagined

    def states_of(self, imagined: TensorDictBase) -> TensorDictBase:
        """A rollout's states and targets ``[B * H]``, what critics learn on."""
        keys = self.losses.value.tensor_keys
        return imagined.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()

    def update_critics(self, imagined: TensorDictBase, row: MetricRow) -> None:
        """Shuffled passes over a rollout's states in minibatches."""
        states = self.states_of(imagined)
        self.continue_critics(EpochWork(0, 0, states=states, passes=self.cfg.algorithm.critic_passes, row=row))

    def continue_critics(self, work: EpochWork) -> None:
        """What is left of the passes over a rollout's states."""
        states = work.states
        assert states is not None
        minibatch = math.ceil(len(states) / self.cfg.algorithm.critic_minibatches)
        while work.passes or work.minibatches:
            self.stop.check()
            if not work.minibatches:
                work.minibatches = list(torch.randperm(len(states), device=states.device).split(minibatch))
                work.passes -= 1
            self.update_critics_once(states, work.minibatches[0], work.row)
            self.made += 1
            del work.minibatches[0]
        work.states = None

    def update_critics_once(self, states: TensorDictBase, rows: Tensor, row: MetricRow) -> None:
        """One critic update on the states that ``rows`` names."""
        undo = self.undo["critics"]

        def attempt(size: int) -> tuple[dict[str, Tensor], Tensor]:
            if self.shared is not None:
                return self.shared.critic(states[rows], size)
            losses = self.losses.value.backward(states[rows], size)
            return losses, self.learners["critics"].step(undo.before_step)

        losses, norm = self.micro_batches.run("critic", self.share(len(rows)), undo, attempt)
        row.mean({"loss/value": losses["loss_value"], "grad_norm/value": norm})
        row.set({"critic/value": losses["value"]})

    def gradient_profile(self, observation: Tensor) -> dict[str, float]:
        """Norm of the policy objective's gradient with respect to the action of every horizon step, batch mean."""
        start = self.encode(observation)["latent"]
        rollout, next_value = self.losses.actor.imagine(start)
        returns = self.losses.actor.returns(rollout, next_value)
        gradient = torch.autograd.grad(returns.mean(), rollout.actions)
        return {f"grad_profile/{t:02d}": g.norm(dim=-1).sum().item() for t, g in enumerate(gradient)}
