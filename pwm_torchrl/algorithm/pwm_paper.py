"""PWM as published: Algorithm 1 of *Policy learning with large World Models* (https://arxiv.org/abs/2407.02466).

Each epoch first collects a batch of real transitions, then makes

1. model updates on replayed slices: the world model learns to predict latents and rewards,
2. actor updates: the policy acts in the model for H steps, and the gradient of the imagined return flows back through
   model and reward; each is followed by
3. critic updates on the states of that rollout: the ensemble learns its TD(λ) targets.

An :class:`~pwm_torchrl.algorithm.updates.Updates` object is passed in and carries out each update: in one process or
several, in one batch or in micro-batches. The data come from a :class:`~pwm_torchrl.algorithm.base.Samples`.
Pre-training makes model updates only; policy extraction in a frozen model makes the other two kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.base import Algorithm, EpochWork, MetricRow, Update, Work
from pwm_torchrl.config import Config

__all__ = ["PaperPWM", "PaperWork"]


@dataclass
class PaperWork(EpochWork):
    """The remaining updates of an epoch.

    Attributes:
        actor_updates (int): actor updates left.
        starts (Tensor, optional): observations ``[B, O]`` that the current actor update imagines from.
        states (TensorDict, optional): imagined states ``[B * H]`` for the critic updates in progress.
        passes (int): passes over ``states`` that have not begun.
        minibatches (list of Tensor): rows of ``states`` left in the current pass.
    """

    actor_updates: int
    starts: Tensor | None = None
    states: TensorDictBase | None = None
    passes: int = 0
    minibatches: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Counters and tensors."""
        states = None if self.states is None else dict(self.states.flatten_keys("|").items())
        return {**super().state_dict(), "states": states}

    @classmethod
    def restored(cls: type[Work], state_dict: Mapping[str, Any], device: torch.device) -> Work:
        """Work from :meth:`state_dict`, its tensors on ``device``."""
        values = dict(state_dict)
        if values["states"] is not None:
            values["states"] = TensorDict(values["states"]).auto_batch_size_(1).unflatten_keys("|").to(device)
        if values["starts"] is not None:
            values["starts"] = values["starts"].to(device)
        values["minibatches"] = [rows.to(device) for rows in values["minibatches"]]
        return super().restored(values, device)


class PaperPWM(Algorithm):
    """The updates of an epoch in the published order."""

    work_type = PaperWork
    ignored: ClassVar[tuple[str, ...]] = (
        "updates_per_step", "max_updates", "critic_batch", "critic_steps", "target_rate", "temperature",
        "target_entropy", "temperature_lr",
    )  # fmt: skip
    least: ClassVar[Mapping[str, float]] = {"horizon": 1}

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """Model, actor and critic; pre-training has only the model's, extraction without fine-tuning all but that."""
        a = cfg.algorithm
        states = math.ceil(a.actor_batch * a.horizon / a.critic_minibatches)
        model = Update("model", "slices", a.model_batch, a.model_updates, a.slice_length)
        policy = [
            Update("actor", "rollouts", a.actor_batch, a.actor_updates, a.horizon),
            Update("critic", "states", states, a.actor_updates * a.critic_passes * a.critic_minibatches),
        ]
        if cfg.mode == "pretrain":
            return [model]
        return policy if cfg.mode == "extract" and not cfg.finetune else [model, *policy]

    @property
    def actor_updates(self) -> int:
        """Actor updates of an epoch."""
        return self.cfg.actor_updates

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """Algorithm 1; see :meth:`Algorithm.epoch`."""
        work = self.work = self.work or self._new_work()
        self.set_rates(progress, work.row)
        with self.phase("fitting the model", work.model_updates, 0) as count:
            while work.model_updates:
                self.between()
                self.update_model(work.row)
                work.model_updates -= 1
                count()
        while work.actor_updates or work.states is not None:
            if work.states is None:
                self.between()
                if work.starts is None:
                    work.starts = self.start_observations(batch)
                actors = self.actor_updates
                with self.phase("improving the actor", actors, actors - work.actor_updates):
                    work.states = self.update_actor(work.starts, work.row)
                work.starts = None
                work.actor_updates -= 1
                work.passes = self.cfg.critic_passes
            with self.phase("fitting the critics", 0, 0):
                self.update_critic(work)
        if self.has_data:
            self.started = True
            work.row.set(self.updates.metrics())
        self.work = None
        return work.row

    def update_actor(self, observation: Tensor, row: MetricRow) -> TensorDictBase:
        """One actor update on J = Σ_{t<H} γ^t r_t + γ^H min_k V_k(z_H), imagined from observations ``[B, O]``.

        Returns:
            TensorDictBase: states and TD(λ) targets of the rollout, ``[B * H]``, detached.
        """
        losses, rollout, norm = self.updates.actor(lambda: self.encode(observation), len(observation))
        row.mean({"loss/actor": losses["loss_actor"], "grad_norm/actor": norm})
        for key in ("imagined_return", "imagined_reward", "return_std", "terminated"):
            row.mean({f"imagination/{key.removeprefix('imagined_')}": losses[key]})
        if self.networks.actor.log_std is not None:
            row.set({"policy/std": self.networks.actor.log_std.detach().exp().mean()})
        return self.critic_states(rollout)

    def critic_states(self, rollout: TensorDictBase) -> TensorDictBase:
        """The critics' training data from a rollout ``[B, H]``: states and targets, ``[B * H]``.

        Keep no other reference to the rollout, or it stays in memory during the next actor update.
        """
        keys = self.losses.critic.tensor_keys
        return rollout.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()

    def update_critic(self, work: PaperWork) -> None:
        """Critic updates in shuffled passes over ``work.states``: mean_k (V_k(z) − target)²."""
        states = work.states
        assert states is not None
        minibatch = math.ceil(len(states) / self.cfg.critic_minibatches)
        while work.passes or work.minibatches:
            self.between()
            if not work.minibatches:
                work.minibatches = list(torch.randperm(len(states), device=states.device).split(minibatch))
                work.passes -= 1
            rows = work.minibatches[0]
            losses, norm = self.updates.critic(partial(getitem, states, rows), len(rows))
            work.row.mean({"loss/critic": losses["loss_value"], "grad_norm/critic": norm})
            work.row.set({"critic/value": losses["value"]})
            del work.minibatches[0]
        work.states = None

    def _new_work(self) -> PaperWork:
        if not self.has_data:
            return PaperWork(0, 0)
        models = self.cfg.model_updates if self.started else self.first_model_updates
        return PaperWork(
            models if "model" in self.optimizers else 0,
            self.actor_updates if "actor" in self.optimizers else 0,
        )
