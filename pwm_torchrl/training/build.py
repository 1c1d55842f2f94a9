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
    TaskWorldModel,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_facts,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.training.config import Config, ModelConfig
from pwm_torchrl.training.updates import trained_networks

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class EnvFacts(Protocol):
    """What construction needs to know of an environment; :class:`pwm_torchrl.envs.EnvInfo` has it."""

    @property
    def observation_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def terminates(self) -> bool: ...
    @property
    def action_dims(self) -> tuple[int, ...]: ...
    @property
    def action_low(self) -> tuple[float, ...]: ...
    @property
    def action_high(self) -> tuple[float, ...]: ...


@dataclass
class ModelNetworks:
    """The modules of a run; pre-training has a world model alone."""

    world_model: WorldModel

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) pairs, as checkpoints name them."""
        yield "world_model", self.world_model


@dataclass
class Networks(ModelNetworks):
    """The modules of a run that has a policy; every other object refers to these."""

    actor: Actor
    critics: CriticEnsemble

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().items()
        yield "actor", self.actor
        yield "critics", self.critics


@dataclass
class ModelLosses:
    """The objective around a world model."""

    model: PWMModelLoss

    @property
    def return_statistics(self) -> nn.Module | None:
        """Running statistics of imagined returns, of a policy's objective."""
        return None


@dataclass
class Losses(ModelLosses):
    """The three objectives around one set of networks."""

    actor: PWMActorLoss
    value: PWMValueLoss

    @property
    def return_statistics(self) -> nn.Module | None:
        return self.actor.return_statistics


def world_model_spec(cfg: Config, facts: EnvFacts) -> WorldModelSpec:
    """Architecture of the world model; a pre-trained one's is that of its file."""
    model, size = cfg.model, cfg.size
    if cfg.mode == "extract":
        spec = world_model_facts(str(cfg.world_model)).spec
        spec.reward_space = model.reward_space
        if spec.dynamics["kind"] == "flow":
            spec.dynamics["checkpoint_substeps"] = bool(model.dynamics.checkpoint_substeps)
        return spec
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
        num_tasks=len(facts.action_dims),
        task_dim=size.task_dim if facts.action_dims else 0,
        action_dims=list(facts.action_dims),
    )


def dynamics_options(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of :func:`~pwm_torchrl.modules.make_dynamics`; options of flows only for flows."""
    options = dict(vars(model.dynamics))
    options["checkpoint_substeps"] = bool(options["checkpoint_substeps"])
    if options["kind"] != "flow":
        return {"kind": options["kind"]}
    return options


def build_world_model(cfg: Config, facts: EnvFacts) -> WorldModel:
    """The world model, not yet trained; of a policy extraction the view of its task, frozen unless it is fine-tuned."""
    spec = world_model_spec(cfg, facts)
    model = make_world_model(spec)
    if cfg.mode != "extract":
        return model
    names = world_model_facts(str(cfg.world_model)).task_names
    task = names.index(str(cfg.task)) if names else 0
    bound = TaskWorldModel(model, spec, task, facts.observation_dim, facts.action_dim)
    return bound if cfg.finetune else bound.requires_grad_(False)


def build_model_networks(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> ModelNetworks:
    """Build what pre-training trains, on ``device``."""
    return ModelNetworks(on(build_world_model(cfg, facts), device))


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
        on(build_world_model(cfg, facts), device),
        on(actor, device),
        on(CriticEnsemble(size.latent_dim, list(size.critic_units), size.num_critics), device),
    )


@dataclass
class Parts:
    """What a run computes with."""

    networks: ModelNetworks
    losses: ModelLosses
    learners: dict[str, Learner]


def build_parts(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Parts:
    """Networks, objectives and optimizers of a run of any mode."""
    if cfg.mode == "pretrain":
        alone = build_model_networks(cfg, facts, device)
        return Parts(alone, ModelLosses(build_model_loss(cfg, alone.world_model)), build_learners(cfg, alone))
    networks = build_networks(cfg, facts, device)
    return Parts(networks, build_losses(cfg, networks), build_learners(cfg, networks))


def on(module: AnyModule, device: torch.device | str) -> AnyModule:
    """``module`` on ``device``; left alone if it is there, since tensors without data cannot be moved at all."""
    there = all(tensor.device == torch.device(device) for tensor in module.state_dict().values())
    return module if there else module.to(device)


def build_model_loss(cfg: Config, world_model: WorldModel) -> PWMModelLoss:
    """Build the world model's objective."""
    terms = cfg.model.loss
    return PWMModelLoss(
        world_model,
        form=terms.form,
        gamma=cfg.algorithm.gamma,
        rho=terms.rho,
        dynamics_coef=terms.dynamics_coef,
        reward_coef=terms.reward_coef,
        termination_coef=terms.termination_coef,
        rollout_weight=terms.rollout_weight,
        flow_matching_weight=terms.flow_matching_weight,
        flow_matching_source=terms.flow_matching_source,
        self_consistency_weight=terms.self_consistency_weight,
        compile=cfg.algorithm.compile,
    )


def build_losses(cfg: Config, networks: Networks) -> Losses:
    """Build the objectives; they share the networks' parameters."""
    algorithm = cfg.algorithm
    losses = Losses(
        build_model_loss(cfg, networks.world_model),
        PWMActorLoss(
            actor_module(networks.actor),
            world_model_module(networks.world_model),
            value_module(networks.critics),
            horizon=algorithm.horizon,
            gamma=algorithm.gamma,
            lmbda=algorithm.lmbda,
            detach=algorithm.detach,
            entropy_weight=algorithm.entropy_weight,
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


def build_learners(cfg: Config, networks: ModelNetworks) -> dict[str, Learner]:
    """Adam for each network that is trained, by the networks' names."""
    a = cfg.algorithm
    settings = {
        "world_model": (a.model_lr, a.model_betas, a.model_grad_norm),
        "actor": (a.actor_lr, a.policy_betas, a.actor_grad_norm),
        "critics": (a.critic_lr, a.policy_betas, a.critic_grad_norm),
    }
    learners = {}
    for name, module in networks.items():
        if name not in trained_networks(cfg):
            continue
        lr, betas, max_norm = settings[name]
        parameters = list(module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=(betas[0], betas[1]), fused=True)
        learners[name] = Learner(parameters, optimizer, max_norm, lr, a.final_lr)
    return learners
