"""The one construction site: from a configuration and an environment's facts to networks, losses and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.training.config import Config, ModelConfig

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class EnvFacts(Protocol):
    """What construction needs to know of an environment; :class:`pwm_torchrl.envs.EnvInfo` has it."""

    @property
    def observation_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def terminates(self) -> bool: ...


@dataclass
class Networks:
    """The modules that training changes; every other object refers to these."""

    world_model: WorldModel
    actor: Actor
    critics: CriticEnsemble

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) pairs, as checkpoints name them."""
        yield "world_model", self.world_model
        yield "actor", self.actor
        yield "critics", self.critics


@dataclass
class Losses:
    """The three objectives around one set of networks."""

    model: PWMModelLoss
    actor: PWMActorLoss
    value: PWMValueLoss


def world_model_spec(cfg: Config, facts: EnvFacts) -> WorldModelSpec:
    """Architecture of the world model."""
    model, size = cfg.model, cfg.size
    return WorldModelSpec(
        observation_dim=facts.observation_dim,
        action_dim=facts.action_dim,
        latent_dim=size.latent_dim,
        units=list(size.units),
        encoder_units=list(size.encoder_units),
        simnorm_dim=size.simnorm_dim,
        dynamics=dynamics_options(model),
        reward_head=model.reward_head,
        num_bins=model.num_bins,
        vmin=model.vmin,
        vmax=model.vmax,
        reward_space=model.reward_space,
        termination=facts.terminates if model.termination_head is None else model.termination_head,
        normalize_observations=cfg.algorithm.normalize_observations,
    )


def dynamics_options(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of :func:`~pwm_torchrl.modules.make_dynamics`; options of flows only for flows."""
    options = dict(vars(model.dynamics))
    options["checkpoint_substeps"] = bool(options["checkpoint_substeps"])
    if options["kind"] != "flow":
        return {"kind": options["kind"]}
    return options


def build_networks(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
    """Build world model, actor and critics on ``device``."""
    algorithm, size = cfg.algorithm, cfg.size
    actor = Actor(
        size.latent_dim,
        facts.action_dim,
        list(size.actor_units),
        algorithm.log_std_init,
        algorithm.log_std_min,
    )
    return Networks(
        on(make_world_model(world_model_spec(cfg, facts)), device),
        on(actor, device),
        on(CriticEnsemble(size.latent_dim, list(size.critic_units), size.num_critics), device),
    )


def on(module: AnyModule, device: torch.device | str) -> AnyModule:
    """``module`` on ``device``; left alone if it is there, since tensors without data cannot be moved at all."""
    there = all(tensor.device == torch.device(device) for tensor in module.state_dict().values())
    return module if there else module.to(device)


def build_losses(cfg: Config, networks: Networks) -> Losses:
    """Build the objectives; they share the networks' parameters."""
    algorithm, terms = cfg.algorithm, cfg.model.loss
    losses = Losses(
        PWMModelLoss(
            networks.world_model,
            form=terms.form,
            gamma=algorithm.gamma,
            rho=terms.rho,
            dynamics_coef=terms.dynamics_coef,
            reward_coef=terms.reward_coef,
            termination_coef=terms.termination_coef,
            rollout_weight=terms.rollout_weight,
            flow_matching_weight=terms.flow_matching_weight,
            flow_matching_source=terms.flow_matching_source,
            self_consistency_weight=terms.self_consistency_weight,
            compile=algorithm.compile,
        ),
        PWMActorLoss(
            actor_module(networks.actor),
            world_model_module(networks.world_model),
            value_module(networks.critics),
            horizon=algorithm.horizon,
            gamma=algorithm.gamma,
            lmbda=algorithm.lmbda,
            detach=algorithm.detach,
            normalize_returns=algorithm.normalize_returns,
            compile=algorithm.compile,
        ),
        PWMValueLoss(networks.critics),
    )
    on(losses.actor.return_statistics, next(networks.actor.parameters()).device)
    return losses


@dataclass
class Learner:
    """One network's optimizer, its gradient-norm limit and its learning-rate schedule."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Adam
    max_norm: float
    lr: float
    final_lr: float

    def set_progress(self, fraction: float) -> None:
        """Learning rate, linear from ``lr`` at 0 to ``final_lr`` at 1."""
        value = self.lr + (self.final_lr - self.lr) * min(max(fraction, 0.0), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def step(self, before: Callable[[], None] | None = None) -> torch.Tensor:
        """Clip, step, clear; returns the gradient norm before clipping, a detached scalar.

        ``before`` is called when the gradients are ready, just before the parameters change.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        if before is not None:
            before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()


def build_learners(cfg: Config, networks: Networks) -> dict[str, Learner]:
    """Adam for each network, by the networks' names."""
    a = cfg.algorithm
    settings = {
        "world_model": (a.model_lr, a.model_betas, a.model_grad_norm),
        "actor": (a.actor_lr, a.policy_betas, a.actor_grad_norm),
        "critics": (a.critic_lr, a.policy_betas, a.critic_grad_norm),
    }
    learners = {}
    for name, module in networks.items():
        lr, betas, max_norm = settings[name]
        parameters = list(module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=(betas[0], betas[1]), fused=True)
        learners[name] = Learner(parameters, optimizer, max_norm, lr, a.final_lr)
    return learners
