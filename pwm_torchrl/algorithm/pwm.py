"""PWM, Algorithm 1 of *Policy learning with large World Models* (https://arxiv.org/abs/2407.02466).

An epoch follows the collection of a batch of real transitions. It makes

1. model updates on replayed slices: the world model learns to predict latents and rewards,
2. actor updates: the policy acts in the model for H steps, and the gradient of the imagined return goes back through
   model and reward; after each of them
3. critic updates on the states of that rollout: the ensemble learns its TD(λ) targets.

How one update is carried out, alone or shared among processes, at once or in micro-batches, is handed in
(:class:`~pwm_torchrl.algorithm.updates.Updates`), and so is the source of the data (:class:`Samples`). Pre-training has
the first part alone; policy extraction in a frozen model has the other two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.build import Losses, NetworkOptimizer, Networks
from pwm_torchrl.algorithm.metrics import MetricRow
from pwm_torchrl.algorithm.updates import Updates
from pwm_torchrl.config import AlgorithmConfig
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import RewardScale

__all__ = ["ACTOR_STARTS", "PWM", "EpochWork", "Samples"]

#: Where imagination may start: anywhere in the samples, or in the batch that was just collected.
ACTOR_STARTS = ("replay", "current")


class Samples(Protocol):
    """What updates draw from: a replay, or stored episodes."""

    @property
    def device(self) -> torch.device:
        """Of what is drawn."""

    @property
    def collected(self) -> int:
        """Transitions that were ever stored."""

    @property
    def can_sample(self) -> bool:
        """Whether there is a whole slice."""

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, H]``."""

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``."""


@dataclass
class EpochWork:
    """What is left of an epoch's updates, and their metrics so far: an epoch that is stopped inside goes on with it.

    Attributes:
        model_updates (int): model updates left.
        actor_updates (int): actor updates left.
        starts (Tensor, optional): observations ``[B, O]`` from which the present actor update imagines.
        states (TensorDict, optional): imagined states ``[B * H]`` on which the critics are learning.
        passes (int): passes over ``states`` that have not begun.
        minibatches (list of Tensor): rows of ``states`` left in the present pass.
        row (MetricRow): metrics.
    """

    model_updates: int
    actor_updates: int
    starts: Tensor | None = None
    states: TensorDictBase | None = None
    passes: int = 0
    minibatches: list[Tensor] = field(default_factory=list)
    row: MetricRow = field(default_factory=MetricRow)

    def state_dict(self) -> dict[str, Any]:
        """Counters and tensors."""
        states = None if self.states is None else dict(self.states.flatten_keys("|").items())
        return {**vars(self), "states": states, "row": self.row.state_dict()}

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], device: torch.device) -> EpochWork:
        """Work as :meth:`state_dict` gave it, its tensors on ``device``."""
        values = dict(state_dict)
        if values["states"] is not None:
            values["states"] = TensorDict(values["states"]).auto_batch_size_(1).unflatten_keys("|").to(device)
        if values["starts"] is not None:
            values["starts"] = values["starts"].to(device)
        values["minibatches"] = [rows.to(device) for rows in values["minibatches"]]
        return cls(**{**values, "row": MetricRow.restored(values["row"], device)})


class PWM:
    """The updates of an epoch.

    Args:
        cfg (AlgorithmConfig): numbers of updates and sizes of batches.
        networks (Networks): what is trained.
        losses (Losses): the objectives around ``networks``.
        optimizers (dict of NetworkOptimizer): of the networks that are trained; the updates of others are left out.
        samples (Samples): source of slices and start states.
        updates (Updates): carries out single updates.

    Keyword Args:
        reward_scale (RewardScale, optional): divides rewards before the model sees them. Defaults to ``None``.
        first_model_updates (int, optional): model updates of the first epoch that has any. Defaults to ``None``:
            ``cfg.model_updates``.
        stored (bool): whether the data are there from the beginning; else epochs pass without updates until
            ``cfg.random_steps`` transitions and a whole slice are collected. Defaults to ``False``.
        between (callable, optional): called between two updates; what it raises leaves the epoch at a place where
            :meth:`epoch` goes on when it is called again. Defaults to ``None``.

    Attributes:
        work (EpochWork, optional): what is left of an epoch that has begun.
        started (bool): whether the first updates have been made.

    Raises:
        ConfigurationError: for an unknown place where imagination starts.
    """

    def __init__(
        self,
        cfg: AlgorithmConfig,
        networks: Networks,
        losses: Losses,
        optimizers: Mapping[str, NetworkOptimizer],
        samples: Samples,
        updates: Updates,
        *,
        reward_scale: RewardScale | None = None,
        first_model_updates: int | None = None,
        stored: bool = False,
        between: Callable[[], None] | None = None,
    ) -> None:
        if cfg.actor_starts not in ACTOR_STARTS:
            raise ConfigurationError(
                f"algorithm.actor_starts={cfg.actor_starts!r} is not one of {', '.join(ACTOR_STARTS)}."
            )
        self.cfg, self.networks, self.losses, self.optimizers = cfg, networks, losses, optimizers
        self.samples, self.updates, self.reward_scale = samples, updates, reward_scale
        self.first_model_updates = cfg.model_updates if first_model_updates is None else first_model_updates
        self.stored = stored
        self.between = between or (lambda: None)
        self.work: EpochWork | None = None
        self.started = False

    # Algorithm 1 ------------------------------------------------------------------------------------------------------

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """One epoch's updates.

        Args:
            batch (TensorDictBase): what was just collected, ``[N, T]``; it is in ``samples`` already.
            progress (float): how much of the training is done, from 0 to 1, for the learning rates.

        Returns:
            MetricRow: means over the epoch; empty while too little is collected for updates.
        """
        work = self.work = self.work or self._new_work()
        for name, optimizer in self.optimizers.items():
            work.row.set({f"lr/{name}": optimizer.set_progress(progress)})
        while work.model_updates:
            self.between()
            self.update_model(work.row)
            work.model_updates -= 1
        while work.actor_updates or work.states is not None:
            if work.states is None:
                self.between()
                if work.starts is None:
                    work.starts = self.start_observations(batch)
                work.states = self.update_actor(work.starts, work.row)
                work.starts = None
                work.actor_updates -= 1
                work.passes = self.cfg.critic_passes
            self.update_critic(work)
        if self.has_data:
            self.started = True
            work.row.set(self.updates.metrics())
        self.work = None
        return work.row

    def update_model(self, row: MetricRow) -> None:
        """One model update on replayed slices: L = (L_dyn + L_rew) / H over z_{t+1} = d(z_t, a_t), z_0 = h(o_0)."""
        count = self.cfg.model_batch
        losses, valid, norm = self.updates.model(lambda: self.sample_slices(count), count)
        row.mean({"loss/model": torch.stack(list(losses.values())).sum()})
        row.mean({key.replace("loss_", "loss/model_"): value for key, value in losses.items()})
        row.mean({"grad_norm/model": norm, "data/valid_fraction": valid})

    def update_actor(self, observation: Tensor, row: MetricRow) -> TensorDictBase:
        """One actor update on J = Σ_{t<H} γ^t r_t + γ^H min_k V_k(z_H), imagined from observations ``[B, O]``.

        Returns:
            TensorDictBase: states and TD(λ) targets of the rollout, ``[B * H]``, detached.
        """
        losses, rollout, norm = self.updates.actor(lambda: self.encode(observation), len(observation))
        row.mean({"loss/actor": losses["loss_actor"], "grad_norm/actor": norm})
        for key in ("imagined_return", "imagined_reward", "return_std", "terminated"):
            row.mean({f"imagination/{key.removeprefix('imagined_')}": losses[key]})
        std = self.networks.actor.log_std.detach().clamp_min(self.networks.actor.log_std_min).exp()
        row.set({"policy/std": std.mean()})
        # Nothing but these states may keep the rollout: it would live on beside the next actor update.
        keys = self.losses.critic.tensor_keys
        return rollout.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()

    def update_critic(self, work: EpochWork) -> None:
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

    # What the updates start from --------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether enough is collected for updates."""
        enough = self.samples.collected >= self.cfg.random_steps and self.samples.can_sample
        return self.stored or enough

    def _new_work(self) -> EpochWork:
        if not self.has_data:
            return EpochWork(0, 0)
        models = self.cfg.model_updates if self.started else self.first_model_updates
        return EpochWork(
            models if "model" in self.optimizers else 0,
            self.cfg.actor_updates if "actor" in self.optimizers else 0,
        )

    def sample_slices(self, count: int) -> TensorDictBase:
        """Replayed slices ``[count, H]``, rewards scaled."""
        slices = self.samples.sample_slices(count)
        if self.reward_scale is not None:
            slices["next", "reward"] = self.reward_scale(slices["next", "reward"])
        return slices

    @torch.no_grad()
    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """Observations ``[actor_batch, O]`` from which to imagine, replayed or of this epoch's batch."""
        count = self.cfg.actor_batch
        if self.cfg.actor_starts == "replay":
            return self.samples.sample_observations(count)
        current = batch.get("observation").flatten(0, 1).to(self.samples.device)
        return current[torch.randperm(len(current), device=current.device)[:count]]

    def encode(self, observation: Tensor) -> TensorDictBase:
        """Start latents ``[B]``, without gradient."""
        with torch.no_grad():
            latent = self.networks.model.encode(observation)
        return TensorDict(latent=latent, batch_size=latent.shape[:1])

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Reduced micro-batches and unfinished work; networks and optimizers are components of their own."""
        return {
            "started": self.started,
            "updates": self.updates.state_dict(),
            "work": None if self.work is None else self.work.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.started = bool(state_dict["started"])
        self.updates.load_state_dict(state_dict["updates"])
        work = state_dict["work"]
        self.work = None if work is None else EpochWork.restored(work, self.samples.device)
