"""Builds networks, losses and optimizers from a configuration and an environment's facts; nothing else builds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn

from pwm_torchrl.config import Config, ModelConfig
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
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss, SoftActorLoss

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class EnvFacts(Protocol):
    """What the builders need to know about an environment; :class:`pwm_torchrl.envs.EnvInfo` implements it."""

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
    @property
    def simulator(self) -> Any: ...


@dataclass(frozen=True)
class Facts:
    """The environment's properties that networks and policies depend on; saved in every checkpoint."""

    observation_dim: int
    action_dim: int
    terminates: bool
    action_dims: tuple[int, ...] = ()  # one per task of a multi-task world model
    action_low: tuple[float, ...] = ()  # in the environment's own units; empty in checkpoints without bounds
    action_high: tuple[float, ...] = ()
    simulator: ClassVar[None] = None  # only live differentiable environments have one; it is not saved

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Facts:
        """Facts from checkpoint metadata, which stores tuples as lists."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)


def facts_of(facts: EnvFacts) -> dict[str, Any]:
    """Facts as checkpoint metadata."""
    return asdict(
        Facts(
            facts.observation_dim,
            facts.action_dim,
            facts.terminates,
            tuple(facts.action_dims),
            tuple(facts.action_low),
            tuple(facts.action_high),
        )
    )


@dataclass
class Networks:
    """The networks of a run, by the names that losses, optimizers, updates and checkpoints share.

    Attributes:
        model (WorldModel, optional): ``None`` if the policy is trained in a differentiable environment.
        actor (Actor, optional): ``None`` in pre-training.
        critic (CriticEnsemble, optional): ``None`` in pre-training.
    """

    # Typed as if never None: a mode does not use the networks that it lacks.
    model: WorldModel = None  # type: ignore[assignment]
    actor: Actor = None  # type: ignore[assignment]
    critic: CriticEnsemble = None  # type: ignore[assignment]

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the networks that exist."""
        for field in fields(self):
            module = getattr(self, field.name)
            if module is not None:
                yield field.name, module


@dataclass
class Losses:
    """The objectives of one set of networks, under the networks' names."""

    # Typed as if never None, like the networks.
    model: PWMModelLoss = None  # type: ignore[assignment]
    actor: PWMActorLoss | SoftActorLoss = None  # type: ignore[assignment]
    critic: PWMValueLoss = None  # type: ignore[assignment]

    @property
    def return_statistics(self) -> nn.Module | None:
        """Running statistics of imagined returns; ``None`` without an actor."""
        return None if self.actor is None else self.actor.return_statistics


def world_model_spec(cfg: Config, facts: EnvFacts) -> WorldModelSpec:
    """Architecture of the world model; in extraction, read from the pre-trained model's file."""
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
        scale_rewards=cfg.algorithm.scale_rewards,
        num_tasks=len(facts.action_dims),
        task_dim=size.task_dim if facts.action_dims else 0,
        action_dims=list(facts.action_dims),
    )


def dynamics_options(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of :func:`~pwm_torchrl.modules.make_dynamics`; flow options only if the kind is a flow."""
    options = dict(vars(model.dynamics))
    options["checkpoint_substeps"] = bool(options["checkpoint_substeps"])
    if options["kind"] != "flow":
        return {"kind": options["kind"]}
    return options


def build_world_model(cfg: Config, facts: EnvFacts) -> WorldModel:
    """A new, untrained world model; in policy extraction, its view for one task, frozen unless it is fine-tuned."""
    spec = world_model_spec(cfg, facts)
    model = make_world_model(spec)
    if cfg.mode != "extract":
        return model
    names = world_model_facts(str(cfg.world_model)).task_names
    task = names.index(str(cfg.task)) if names else 0
    bound = TaskWorldModel(model, spec, task, facts.observation_dim, facts.action_dim)
    return bound if cfg.finetune else bound.requires_grad_(False)


def build_networks(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
    """A world model and, except in pre-training, an actor and critics on its latents; on ``device``."""
    if cfg.mode == "pretrain":
        return Networks(model=module_to_device(build_world_model(cfg, facts), device))
    actor = build_actor(cfg, cfg.size.latent_dim, facts.action_dim)  # built first, so that a seed keeps its networks
    networks = Networks(
        model=module_to_device(build_world_model(cfg, facts), device), actor=module_to_device(actor, device)
    )
    scaled = networks.model.reward_deviation is not None
    networks.critic = module_to_device(build_critic(cfg, cfg.size.latent_dim, scaled=scaled), device)
    return networks


def build_actor(cfg: Config, input_dim: int, action_dim: int, temperature: float | None = None) -> Actor:
    """A policy on latents or observations; ``temperature`` is the initial value of a learned entropy weight."""
    return Actor(
        input_dim,
        action_dim,
        list(cfg.size.actor_units),
        cfg.algorithm.log_std_init,
        cfg.algorithm.log_std_min,
        state_std=cfg.algorithm.state_std,
        temperature=temperature,
    )


def build_critic(cfg: Config, input_dim: int, action_dim: int = 0, scaled: bool = False) -> CriticEnsemble:
    """Critics of latents or observations, and of actions if ``action_dim`` is set; ``scaled``: in reward units."""
    units = list(cfg.size.critic_units)
    return CriticEnsemble(input_dim, units, cfg.size.num_critics, action_dim=action_dim, scaled=scaled)


def module_to_device(module: AnyModule, device: torch.device | str) -> AnyModule:
    """``module`` on ``device``; no-op if it is there already, since meta tensors cannot be moved."""
    there = all(tensor.device == torch.device(device) for tensor in module.state_dict().values())
    return module if there else module.to(device)


def compiles(cfg: Config) -> bool:
    """Whether the losses compile; an unresolved ``auto`` counts as no."""
    return str(cfg.algorithm.compile).lower() == "true"


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
        one_step_weight=terms.one_step_weight,
        flow_matching_weight=terms.flow_matching_weight,
        flow_matching_source=terms.flow_matching_source,
        self_consistency_weight=terms.self_consistency_weight,
        few_step_weight=terms.few_step_weight,
        few_step_rollout=terms.few_step_rollout,
        compile=compiles(cfg),
        precision=cfg.training.precision,
    )


def build_losses(cfg: Config, networks: Networks) -> Losses:
    """The losses of the networks that exist; they share the networks' parameters."""
    losses = Losses()
    if networks.model is not None:
        losses.model = build_model_loss(cfg, networks.model)
    if networks.actor is None or networks.critic is None:
        return losses
    losses.actor = build_actor_loss(cfg, networks.actor, world_model_module(networks.model), networks.critic)
    losses.critic = PWMValueLoss(networks.critic, precision=cfg.training.precision)
    return losses


def build_actor_loss(cfg: Config, actor: Any, step: TensorDictModuleBase, critic: Any) -> PWMActorLoss:
    """The actor's objective.

    Args:
        cfg (Config): the run's configuration.
        actor (nn.Module): latents -> mean and standard deviation, as :class:`~pwm_torchrl.modules.Actor`.
        step (TensorDictModuleBase): ``latent``, ``action`` -> next latent, reward and termination, as
            :func:`~pwm_torchrl.modules.world_model_module`.
        critic (nn.Module): has a method ``value``, as :class:`~pwm_torchrl.modules.CriticEnsemble`.
    """
    algorithm = cfg.algorithm
    loss = PWMActorLoss(
        actor_module(actor),
        step,
        value_module(critic),
        horizon=algorithm.horizon,
        gamma=algorithm.gamma,
        lmbda=algorithm.lmbda,
        detach=algorithm.detach,
        entropy_weight=algorithm.entropy_weight,
        normalize_returns=algorithm.normalize_returns,
        compile=compiles(cfg),
        precision=cfg.training.precision,
    )
    module_to_device(loss.return_statistics, next(actor.parameters()).device)
    return loss


@dataclass
class NetworkOptimizer:
    """Adam for one network, with gradient clipping and a linear learning-rate schedule; ``final_lr=None``: constant."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Adam
    max_norm: float
    lr: float
    final_lr: float | None
    shares: tuple[float, ...] = (1.0,)  # each parameter group's learning rate as a fraction of ``lr``

    def set_progress(self, fraction: float) -> float:
        """Set and return the learning rate, linear from ``lr`` at 0 to ``final_lr`` at 1."""
        if self.final_lr is None:
            return self.lr
        value = self.lr + (self.final_lr - self.lr) * min(max(fraction, 0.0), 1.0)
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = value * share
        return value

    def step(self, before: Callable[[], None] | None = None) -> torch.Tensor:
        """Clip the gradients, step, clear them; returns the gradient norm before clipping, a detached scalar.

        ``before`` is called after clipping, just before the parameters change.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        if before is not None:
            before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()


def build_optimizers(cfg: Config, networks: Networks) -> dict[str, NetworkOptimizer]:
    """An optimizer for each network that is not frozen, by name."""
    optimizers = {}
    for name, module in networks.items():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        lr, betas, max_norm = (getattr(cfg.algorithm, f"{name}_{setting}") for setting in ("lr", "betas", "grad_norm"))
        parameters = list(module.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr}]
        shares: tuple[float, ...] = (1.0,)
        slow = cfg.algorithm.temperature_lr
        if slow is not None and isinstance(module, Actor) and module.log_temperature is not None:
            others = [p for p in parameters if p is not module.log_temperature]
            groups = [{"params": others, "lr": lr}, {"params": [module.log_temperature], "lr": slow}]
            shares = (1.0, slow / lr)
        adam = torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)
        if isinstance(module, Actor):
            adam.register_step_post_hook(lambda *_, actor=module: actor.keep_std())
        optimizers[name] = NetworkOptimizer(parameters, adam, max_norm, lr, cfg.algorithm.final_lr, shares)
    return optimizers
