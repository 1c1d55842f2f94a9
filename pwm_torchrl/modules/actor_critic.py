"""Actor, critics, and everything that acts or predicts as TensorDictModules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs import ExplorationType
from torchrl.modules import ProbabilisticActor, TanhNormal

from pwm_torchrl.modules.layers import init_policy_weights, policy_mlp
from pwm_torchrl.modules.numerics import batched_linear, mish_norm
from pwm_torchrl.modules.world_model import TaskEmbedding, WorldModel

# Gaussian-tanh policy on latents --------------------------------------------------------------------------------------


class Actor(nn.Module):
    """a = tanh(mean(z) + exp(log_std) · noise), with a state-independent log-std.

    Blocks of Linear -> Mish -> LayerNorm, as PWM's (https://arxiv.org/abs/2407.02466).

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        units (sequence of int): hidden widths. Defaults to ``(400, 200, 100)``.
        log_std_init (float): initial log-std. Defaults to ``-1.0``.
        log_std_min (float): floor of the log-std. Defaults to ``-1.427``.

    Examples:
        >>> actor = Actor(16, 2)
        >>> actor.act(torch.zeros(3, 16)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (400, 200, 100),
        log_std_init: float = -1.0,
        log_std_min: float = -1.427,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = policy_mlp(latent_dim, units, action_dim)
        self.log_std_init = float(log_std_init)
        self.log_std = nn.Parameter(torch.full((action_dim,), self.log_std_init))
        self.log_std_min = log_std_min

    def reset_parameters(self) -> None:
        """Initialise anew."""
        self.net.apply(init_policy_weights)
        nn.init.constant_(self.log_std, self.log_std_init)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the Gaussian before tanh, both ``[..., A]``."""
        mean = self.net(latent)
        std = self.log_std.clamp_min(self.log_std_min).exp()
        return mean, std.expand_as(mean)

    def act(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Action ``[..., A]`` in (−1, 1).

        Args:
            latent (Tensor): ``[..., D]``.
            noise (Tensor, optional): standard normal ``[..., A]``; ``None`` gives the deterministic tanh(mean).
        """
        mean, std = self(latent)
        return torch.tanh(mean if noise is None else mean + std * noise)


# Ensemble of value functions on latents -------------------------------------------------------------------------------


class CriticEnsemble(nn.Module):
    """K value MLPs evaluated together, their parameters stacked along a first dimension.

    Blocks of Linear -> Mish -> LayerNorm, orthogonal initialisation with gain √2. ``params[n]`` is the n-th parameter
    of one MLP in definition order, stacked over the ensemble, so that a batched matrix product serves all members.

    Args:
        latent_dim (int): ``D``.
        units (sequence of int): hidden widths. Defaults to ``(400, 200)``.
        num_critics (int): ``K``. Defaults to ``3``.

    Examples:
        >>> CriticEnsemble(16)(torch.zeros(5, 16)).shape
        torch.Size([3, 5, 1])
    """

    def __init__(self, latent_dim: int, units: Sequence[int] = (400, 200), num_critics: int = 3) -> None:
        super().__init__()
        self.latent_dim, self.units, self.num_critics = latent_dim, tuple(units), num_critics
        self.params = nn.ParameterList(nn.Parameter(stack) for stack in self._initial())

    def _initial(self) -> list[Tensor]:
        members = [policy_mlp(self.latent_dim, self.units, 1) for _ in range(self.num_critics)]
        return [torch.stack([p.detach() for p in stack]) for stack in zip(*(m.parameters() for m in members))]

    def reset_parameters(self) -> None:
        """Initialise anew."""
        with torch.no_grad():
            for parameter, value in zip(self.params, self._initial(), strict=True):
                parameter.copy_(value)

    def forward(self, latent: Tensor) -> Tensor:
        """Values ``[K, ..., 1]`` of latents ``[..., D]``, one per member."""
        return self._evaluate(list(self.params), latent)

    def one_by_one(self, latent: Tensor) -> Tensor:
        """The same values, from a loop over the members instead of batched products."""
        params = list(self.params)
        return torch.cat([self._evaluate([p[k : k + 1] for p in params], latent) for k in range(self.num_critics)])

    @staticmethod
    def _evaluate(params: list[Tensor], latent: Tensor) -> Tensor:
        batch = latent.shape[:-1]
        x = latent.reshape(-1, latent.shape[-1]).expand(params[0].shape[0], -1, -1)
        while len(params) > 2:
            weight, bias, scale, shift, *params = params
            x = mish_norm(batched_linear(x, weight, bias), scale.unsqueeze(1), shift.unsqueeze(1))
        weight, bias = params
        return batched_linear(x, weight, bias).unflatten(1, batch)

    def value(self, latent: Tensor) -> Tensor:
        """Pessimistic value min_k V_k ``[..., 1]``."""
        return self(latent).amin(0)


# TensorDict shells around the plain networks, with configurable keys --------------------------------------------------


class _Encode(nn.Module):
    """``WorldModel.encode`` as a module of its own."""

    def __init__(self, world_model: WorldModel) -> None:
        super().__init__()
        self.world_model = world_model

    def forward(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        return self.world_model.encode(observation, task)


class _MaskAction(nn.Module):
    """``TaskEmbedding.mask`` at work; a world model in two places of a policy would break functional calls."""

    action_mask: Tensor

    def __init__(self, embedding: TaskEmbedding) -> None:
        super().__init__()
        self.register_buffer("action_mask", embedding.action_mask, persistent=False)

    def forward(self, action: Tensor, task: Tensor) -> Tensor:
        return action * self.action_mask[task]


class _MinValue(nn.Module):
    """``CriticEnsemble.value`` as a module of its own."""

    def __init__(self, critics: CriticEnsemble) -> None:
        super().__init__()
        self.critics = critics

    def forward(self, latent: Tensor) -> Tensor:
        return self.critics.value(latent)


def encoder_module(
    world_model: WorldModel | None,
    *,
    observation: NestedKey = "observation",
    latent: NestedKey = "latent",
    task: NestedKey | None = None,
) -> TensorDictModule:
    """``observation`` (and ``task``) -> ``latent``; without a world model they are the same."""
    in_keys = [observation] if task is None else [observation, task]
    if world_model is None:
        return TensorDictModule(nn.Identity(), in_keys=in_keys, out_keys=[latent])
    return TensorDictModule(_Encode(world_model), in_keys=in_keys, out_keys=[latent])


def world_model_module(
    world_model: WorldModel,
    *,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    next_latent: NestedKey = ("next", "latent"),
    reward: NestedKey = ("next", "reward"),
    terminated: NestedKey = ("next", "terminated"),
    task: NestedKey | None = None,
) -> TensorDictModule:
    """One imagined step: ``latent``, ``action`` (and ``task``) -> ``next_latent``, ``reward``, ``terminated``."""
    in_keys = [latent, action] if task is None else [latent, action, task]
    return TensorDictModule(world_model, in_keys=in_keys, out_keys=[next_latent, reward, terminated])


def actor_module(
    actor: Actor,
    *,
    action_spec: TensorSpec | None = None,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    loc: NestedKey = "loc",
    scale: NestedKey = "scale",
) -> ProbabilisticActor:
    """``latent`` -> ``loc``, ``scale`` -> ``action``: a :class:`~torchrl.modules.ProbabilisticActor` over TanhNormal.

    Follows TorchRL's exploration type: sampling by default, tanh(loc) under ``ExplorationType.DETERMINISTIC``.
    """
    return ProbabilisticActor(
        TensorDictModule(actor, in_keys=[latent], out_keys=[loc, scale]),
        in_keys={"loc": loc, "scale": scale},
        out_keys=[action],
        spec=action_spec,
        distribution_class=TanhNormal,
        default_interaction_type=ExplorationType.RANDOM,
    )


def value_module(
    critics: CriticEnsemble,
    *,
    latent: NestedKey = "latent",
    state_value: NestedKey = "state_value",
) -> TensorDictModule:
    """``latent`` -> ``state_value`` ``[..., 1]``, the minimum over the ensemble."""
    return TensorDictModule(_MinValue(critics), in_keys=[latent], out_keys=[state_value])


def policy_module(
    world_model: WorldModel | None,
    actor: Actor,
    *,
    action_spec: TensorSpec | None = None,
    observation: NestedKey = "observation",
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    task: NestedKey | None = None,
) -> TensorDictSequential:
    """``observation`` -> ``latent`` -> ``action``: acts in an environment on encoded observations.

    With ``task``, the action's padding dimensions are zeroed. A policy of observations has no world model.

    Raises:
        ValueError: if a single-task model gets a ``task``.
    """
    if task is not None and (world_model is None or world_model.task is None):
        raise ValueError("This world model is single-task and takes no task index.")
    modules = [
        encoder_module(world_model, observation=observation, latent=latent, task=task),
        actor_module(actor, action_spec=action_spec, latent=latent, action=action),
    ]
    if task is not None and world_model is not None and world_model.task is not None:
        modules.append(TensorDictModule(_MaskAction(world_model.task), in_keys=[action, task], out_keys=[action]))
    return TensorDictSequential(*modules)
