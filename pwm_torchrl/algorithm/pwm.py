"""The default PWM: short imagined rollouts with first-order gradients, bootstrapped by critics of real transitions.

Each epoch first collects real transitions. ``updates_per_step`` then sets how many *sets* of updates it makes. A set is

1. a model update on replayed slices: predict latents and rewards, over a few steps from the first observation and over
   one step from every later one (:class:`~pwm_torchrl.objectives.PWMModelLoss`),
2. a critic update on replayed real transitions: an ensemble Q_k(z, a) learns soft n-step targets, computed with slowly
   updated target copies (:class:`~pwm_torchrl.objectives.PWMValueLoss`),
3. an actor update: the policy acts in the model for H steps, and the gradient of the imagined rewards and of the final
   value flows back through critics, reward and dynamics (:class:`~pwm_torchrl.objectives.SoftActorLoss`).

``docs/concepts/training_loop.md`` explains the differences from the published algorithm
(:mod:`~pwm_torchrl.algorithm.pwm_paper`), with measurements. Rewards and values are scaled by the running standard
deviation of the rewards, so that one set of defaults works for every task. An
:class:`~pwm_torchrl.algorithm.updates.Updates` object is passed in and carries out each update: in one process or
several, in one batch or in micro-batches. Pre-training makes model updates only.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.base import Algorithm, EpochWork, MetricRow, Update
from pwm_torchrl.algorithm.build import (
    EnvFacts,
    Losses,
    Networks,
    build_actor,
    build_critic,
    build_model_loss,
    build_networks,
    build_world_model,
    compiles,
    module_to_device,
)
from pwm_torchrl.config import AlgorithmConfig, Config
from pwm_torchrl.modules import Actor, CriticEnsemble, WorldModel
from pwm_torchrl.objectives import PWMValueLoss, SoftActorLoss
from pwm_torchrl.objectives.soft_actor_loss import squashed_log_prob

__all__ = ["PWM", "SetWork", "q_targets"]


@dataclass
class SetWork(EpochWork):
    """The remaining updates of an epoch.

    Attributes:
        sets (int): sets of updates left, including the one in progress.
        made (int): updates already made in the set in progress.
    """

    sets: int = 0
    made: int = 0


class PWM(Algorithm):
    """Sets of model, critic and actor updates.

    Attributes:
        target_critic (CriticEnsemble, optional): slowly updated copy of the critics; ``None`` in pre-training.
    """

    work_type = SetWork
    ignored: ClassVar[tuple[str, ...]] = (
        "lmbda", "entropy_weight", "normalize_returns", "critic_passes", "critic_minibatches",
    )  # fmt: skip
    ignored_online: ClassVar[tuple[str, ...]] = ("model_updates", "actor_updates")  # updates_per_step sets their number

    # Class methods that describe the algorithm ------------------------------------------------------------------------

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """Model, critic and actor; pre-training has only the model's, extraction without fine-tuning all but that."""
        a = cfg.algorithm
        if cfg.mode == "pretrain":
            return [Update("model", "slices", a.model_batch, a.model_updates, a.slice_length)]
        stored = cfg.mode == "extract"
        sets = sets_per_epoch(a, None if stored else a.steps_per_env * int(cfg.env.get("num_envs") or 1))
        policy = [
            Update("critic", "transitions", a.critic_batch, sets),
            Update("actor", "rollouts", a.actor_batch, sets, a.horizon),
        ]
        model = Update("model", "slices", a.model_batch, sets, a.slice_length)
        return policy if stored and not cfg.finetune else [model, *policy]

    @classmethod
    def build_networks(cls, cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
        """A world model, an actor with a learned temperature, and critics that take latents and actions."""
        if cfg.mode == "pretrain":
            return build_networks(cfg, facts, device)
        latent_dim, action_dim = cfg.size.latent_dim, facts.action_dim
        actor = build_actor(cfg, latent_dim, action_dim, cfg.algorithm.temperature)
        model = build_world_model(cfg, facts)
        critic = build_critic(cfg, latent_dim, action_dim, scaled=model.reward_deviation is not None)
        return Networks(
            model=module_to_device(model, device),
            actor=module_to_device(actor, device),
            critic=module_to_device(critic, device),
        )

    @classmethod
    def build_losses(cls, cfg: Config, facts: EnvFacts, networks: Networks) -> Losses:
        """The model's loss, and the losses of actor and critics if they exist."""
        a, precision = cfg.algorithm, cfg.training.precision
        losses = Losses(model=build_model_loss(cfg, networks.model))
        if networks.actor is None:
            return losses
        losses.actor = SoftActorLoss(
            networks.actor,
            networks.model,
            networks.critic,
            horizon=a.horizon,
            gamma=a.gamma,
            detach=a.detach,
            target_entropy=a.target_entropy,
            compile=compiles(cfg),
            precision=precision,
        )
        losses.critic = PWMValueLoss(networks.critic, precision=precision)
        return losses

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        critic = self.networks.critic
        self.target_critic = None if critic is None else deepcopy(critic).requires_grad_(False)

    # The algorithm ----------------------------------------------------------------------------------------------------

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """Sets of updates; the first epoch fits the model before them. See :meth:`Algorithm.epoch`."""
        work = self.work = self.work or self._new_work(batch)
        self.set_rates(progress, work.row)
        with self.phase("fitting the model", work.model_updates, 0) as count:
            while work.model_updates:
                self.between()
                self.update_model(work.row)
                work.model_updates -= 1
                count()
        with self.phase("updating model, critic and actor", work.sets, 0) as count:
            while work.sets:
                if work.made == 0:
                    self.between()
                    if "model" in self.optimizers:
                        self.update_model(work.row)
                    work.made = 1
                if work.made == 1:
                    self.between()
                    self.update_critic(work.row)
                    work.made = 2
                self.between()
                starts = self.start_observations(batch)
                self.update_actor(starts, work.row)
                work.made, work.sets = 0, work.sets - 1
                count()
        if self.has_data:
            self.started = True
            work.row.set(self.updates.metrics())
        self.work = None
        return work.row

    def update_critic(self, row: MetricRow) -> None:
        """One critic update on replayed transitions, mean_k (Q_k(z, a) − target)², and a soft target update."""
        count = self.cfg.critic_batch
        losses, norm = self.updates.critic(lambda: self.critic_states(self.sample_slices(count)), count)
        target = self.target_critic
        assert target is not None
        with torch.no_grad():
            torch._foreach_lerp_(list(target.params), list(self.networks.critic.params), self.cfg.target_rate)
        row.mean({"loss/critic": losses["loss_value"], "grad_norm/critic": norm, "critic/value": losses["value"]})

    def critic_states(self, slices: TensorDictBase) -> TensorDictBase:
        """The first steps of slices ``[B, T]`` with their value targets, ``[B]``."""
        target = self.target_critic
        assert target is not None
        networks, cfg = self.networks, self.cfg
        if networks.model.reward_deviation is not None:  # the update rescales the critics themselves
            target.rescale(networks.model.reward_deviation.value)
        return q_targets(networks.model, networks.actor, target, slices, cfg.gamma, cfg.critic_steps)

    def update_actor(self, observation: Tensor, row: MetricRow) -> None:
        """One actor update on J = Σ_{t<H} γ^t c_t (r_t + w h_t) + γ^H c_H (min_k Q_k(z_H, a_H) + w h_H)."""
        losses, _, norm = self.updates.actor(lambda: self.encode(observation), len(observation))
        row.mean({"loss/actor": losses["loss_actor"], "grad_norm/actor": norm})
        for key in ("imagined_return", "imagined_reward", "value", "terminated"):
            row.mean({f"imagination/{key.removeprefix('imagined_')}": losses[key]})
        for key in ("entropy", "saturated"):
            row.mean({f"policy/{key}": losses[key]})
        row.set({"policy/temperature": losses["temperature"]})

    def _new_work(self, batch: TensorDictBase) -> SetWork:
        if not self.has_data:
            return SetWork(0)
        cfg = self.cfg
        first = 0 if self.started or "model" not in self.optimizers else self.first_model_updates
        if "actor" not in self.optimizers:
            return SetWork(first if first else cfg.model_updates)
        return SetWork(first, sets=sets_per_epoch(cfg, None if self.stored else batch.numel()))

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base class's state and the target critics."""
        target = None if self.target_critic is None else dict(self.target_critic.state_dict())
        return {**super().state_dict(), "target_critic": target}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        if self.target_critic is not None:
            self.target_critic.load_state_dict(state_dict["target_critic"])


def sets_per_epoch(algorithm: AlgorithmConfig, agent_steps: int | None) -> int:
    """Number of update sets after ``agent_steps`` collected steps; ``None``: from stored episodes."""
    wanted = algorithm.actor_updates if agent_steps is None else algorithm.wanted_sets(agent_steps)
    return min(algorithm.max_updates, wanted)


@torch.no_grad()
def q_targets(
    model: WorldModel,
    actor: Actor,
    target_critic: CriticEnsemble,
    slices: TensorDictBase,
    gamma: float,
    steps: int,
) -> TensorDictBase:
    """Soft n-step targets of Q(z_0, a_0) on slices of real transitions.

    y = Σ_{k<n} γ^k r_k + γ^n (1 − d_n) (min_k Q̄_k(z_n, a) − w log π(a | z_n)), a ~ π(z_n), where n is ``steps``, or
    fewer if the episode ends earlier in the slice, and d_n is 1 if it ended in a termination. The weight w is the
    actor's temperature times the critics' unit.

    Args:
        model (WorldModel): encodes the observations.
        actor (Actor): the policy; an actor without a temperature adds no entropy term.
        target_critic (CriticEnsemble): Q̄.
        slices (TensorDictBase): ``[B, T]``.
        gamma (float): discount.
        steps (int): n; a slice has at most T.

    Returns:
        TensorDictBase: ``latent``, ``action``, ``value_target``, ``[B]``.
    """
    slices = slices[:, :steps]
    following = slices["next"]
    done = following["done"]
    valid = (done.cumsum(1) - done.long()) == 0  # [B, n, 1]
    count = valid.sum(1)  # [B, 1], at least 1
    weight = valid * gamma ** torch.arange(valid.shape[1], device=valid.device).view(1, -1, 1)
    reward = (weight * model.reward.in_space(following["reward"])).sum(1)
    rows = torch.arange(len(slices), device=valid.device)
    last = following["observation"][rows, count.squeeze(-1) - 1]
    going = ~following["terminated"][rows, count.squeeze(-1) - 1]
    latent = model.encode(torch.cat([slices["observation"][:, 0], last]))
    first, final = latent.chunk(2)
    mean, std = actor(final)
    noise = torch.randn_like(mean)
    u = mean + std * noise
    value = target_critic.value(final, torch.tanh(u))
    if actor.temperature is not None:
        unit = 1.0 if target_critic.scale is None else target_critic.scale
        value = value - actor.temperature * unit * squashed_log_prob(u, std, noise)
    target = reward + gamma**count * going * value
    return TensorDict(latent=first, action=slices["action"][:, 0], value_target=target, batch_size=[len(slices)])
