"""Actor, critics, and everything that acts or predicts as TensorDictModules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs import ExplorationType
from torchrl.modules import ProbabilisticActor, TanhNormal

from pwm_torchrl.modules.heads import rescale
from pwm_torchrl.modules.layers import init_actor_weights, init_critic_weights, policy_mlp
from pwm_torchrl.modules.numerics import batched_linear, mish_norm
from pwm_torchrl.modules.world_model import TaskEmbedding, WorldModel

# Gaussian-tanh policy on latents --------------------------------------------------------------------------------------


#: Range of a standard deviation that depends on the state, as logarithms.
LOG_STD_RANGE = (-5.0, 2.0)


class Actor(nn.Module):
    """a = tanh(mean(z) + std(z) · noise).

    Blocks of Linear -> Mish -> LayerNorm, as PWM's (https://arxiv.org/abs/2407.02466), whose standard deviation does
    not depend on the state.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        units (sequence of int): hidden widths. Defaults to ``(400, 200, 100)``.
        log_std_init (float): initial log-std. Defaults to ``-1.0``.
        log_std_min (float): floor of the log-std; :meth:`keep_std` holds the parameter above it, since a floor in
            ``forward`` would end its gradient for ever. Defaults to ``-1.427``.
        state_std (bool): the network predicts the log-std, too, squashed into (−5, 2). Defaults to ``False``.
        temperature (float, optional): initial weight of the entropy, learned by losses of maximum entropy. Defaults to
            ``None``: the actor has none.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.modules import Actor
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
        state_std: bool = False,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.action_dim, self.state_std = action_dim, state_std
        self.net = policy_mlp(latent_dim, units, action_dim * (2 if state_std else 1))
        self.log_std_init, self.log_std_min = float(log_std_init), log_std_min
        self.initial_temperature = temperature
        self.log_std = None if state_std else nn.Parameter(torch.empty(action_dim))
        self.log_temperature = None if temperature is None else nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew."""
        init_actor_weights(self.net)
        if self.log_std is not None:
            nn.init.constant_(self.log_std, self.log_std_init)
        if self.log_temperature is not None and self.initial_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the Gaussian before tanh, both ``[..., A]``."""
        out = self.net(latent)
        if self.log_std is not None:
            return out, self.log_std.exp().expand_as(out)
        mean, raw = out.chunk(2, -1)
        low, high = LOG_STD_RANGE
        # Begins at log-std_init, where the last layer is nearly 0.
        start = math.atanh(2 * (min(max(self.log_std_init, low + 0.1), high - 0.1) - low) / (high - low) - 1)
        return mean, (low + (high - low) * (torch.tanh(raw + start) + 1) / 2).exp()

    @torch.no_grad()
    def keep_std(self) -> None:
        """Put a log-std below its floor back on it; to be called after each step of an optimizer."""
        if self.log_std is not None:
            self.log_std.clamp_min_(self.log_std_min)

    @property
    def temperature(self) -> Tensor | None:
        """Weight of the entropy, a scalar; ``None`` if the actor has none."""
        return None if self.log_temperature is None else self.log_temperature.exp()

    def act(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Action ``[..., A]`` in (−1, 1).

        Args:
            latent (Tensor): ``[..., D]``.
            noise (Tensor, optional): standard normal ``[..., A]``; ``None`` gives the deterministic tanh(mean).
        """
        mean, std = self(latent)
        return torch.tanh(mean if noise is None else mean + std * noise)


class PinkNoise(nn.Module):
    """Normal noise that is correlated in time, for a policy that explores a fixed batch of environments.

    ε_t = K^(-1/2) Σ_k x_k,t with x_k,t = a_k x_k,t-1 + (1 − a_k²)^(1/2) ξ_k,t, independent normal ξ, a_0 = 0 and
    a_k = exp(−4^(−k)): white noise and first-order processes that forget within 4, 16, 64 and 256 steps, whose sum has
    a spectrum close to 1/f in between. At every step ε is standard normal, so that single actions are distributed as
    the policy says; successive ones push in the same direction more often, and reach states where independent ones
    cancel out (pink noise for exploration: Eberhard et al. 2023, https://openreview.net/forum?id=hQ9V5QN27eS).

    Args:
        num_envs (int): ``N``.
        action_dim (int): ``A``.

    Examples:
        >>> from pwm_torchrl.modules import PinkNoise
        >>> PinkNoise(8, 2)().shape
        torch.Size([8, 2])
    """

    TIMES = (4, 16, 64, 256)
    state: Tensor
    kept: Tensor

    def __init__(self, num_envs: int, action_dim: int) -> None:
        super().__init__()
        kept = torch.tensor([0.0, *(math.exp(-1 / time) for time in self.TIMES)])
        self.register_buffer("kept", kept.view(-1, 1, 1), persistent=False)
        self.register_buffer("state", torch.randn(len(kept), num_envs, action_dim))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The noise of the next step, ``[N, A]``."""
        self.state.mul_(self.kept).add_((1 - self.kept.square()).sqrt() * torch.randn_like(self.state))
        return self.state.sum(0) / math.sqrt(len(self.kept))


# Ensemble of value functions on latents -------------------------------------------------------------------------------


class CriticEnsemble(nn.Module):
    """K value MLPs V(z), or Q(z, a), evaluated together, their parameters stacked along a first dimension.

    Blocks of Linear -> Mish -> LayerNorm, orthogonal initialisation with gain √2, the last layer 0. ``params[n]`` is
    the n-th parameter of one MLP in definition order, stacked over the ensemble, so that a batched matrix product
    serves all members.

    Args:
        latent_dim (int): ``D``.
        units (sequence of int): hidden widths. Defaults to ``(400, 200)``.
        num_critics (int): ``K``. Defaults to ``3``.
        action_dim (int): A, for critics of actions, whose input is [z, a]. Defaults to ``0``, critics of states.
        scaled (bool): the MLPs compute in units of ``scale``, which :meth:`rescale` sets. Defaults to ``False``.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.modules import CriticEnsemble
        >>> CriticEnsemble(16)(torch.zeros(5, 16)).shape
        torch.Size([3, 5, 1])
    """

    scale: Tensor | None

    def __init__(
        self,
        latent_dim: int,
        units: Sequence[int] = (400, 200),
        num_critics: int = 3,
        action_dim: int = 0,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.latent_dim, self.units, self.num_critics = latent_dim, tuple(units), num_critics
        self.action_dim = action_dim
        self.params = nn.ParameterList(nn.Parameter(stack) for stack in self._initial())
        self.register_buffer("scale", torch.ones(1) if scaled else None)

    def _initial(self) -> list[Tensor]:
        members = [policy_mlp(self.latent_dim + self.action_dim, self.units, 1) for _ in range(self.num_critics)]
        for member in members:
            init_critic_weights(member)
        return [torch.stack([p.detach() for p in stack]) for stack in zip(*(m.parameters() for m in members))]

    def reset_parameters(self) -> None:
        """Initialise anew."""
        with torch.no_grad():
            for parameter, value in zip(self.params, self._initial(), strict=True):
                parameter.copy_(value)

    def rescale(self, scale: Tensor) -> None:
        """Compute in units of ``scale`` ``[1]`` from now on; values stay what they are."""
        if self.scale is not None:
            rescale(self.scale, scale, list(self.params)[-2:])

    def forward(self, latent: Tensor, action: Tensor | None = None) -> Tensor:
        """Values ``[K, ..., 1]`` of latents ``[..., D]`` (and actions ``[..., A]``), one per member."""
        return self._evaluate(list(self.params), self._input(latent, action))

    def one_by_one(self, latent: Tensor, action: Tensor | None = None) -> Tensor:
        """The same values, from a loop over the members instead of batched products."""
        params, x = list(self.params), self._input(latent, action)
        return torch.cat([self._evaluate([p[k : k + 1] for p in params], x) for k in range(self.num_critics)])

    def _input(self, latent: Tensor, action: Tensor | None) -> Tensor:
        if (action is None) != (self.action_dim == 0):
            raise ValueError(
                f"critics with action_dim={self.action_dim} "
                + ("need an action." if action is None else "are functions of the state and take no action.")
            )
        return latent if action is None else torch.cat([latent, action], -1)

    def _evaluate(self, params: list[Tensor], inputs: Tensor) -> Tensor:
        batch = inputs.shape[:-1]
        x = inputs.reshape(-1, inputs.shape[-1]).expand(params[0].shape[0], -1, -1)
        while len(params) > 2:
            weight, bias, scale, shift, *params = params
            x = mish_norm(batched_linear(x, weight, bias), scale.unsqueeze(1), shift.unsqueeze(1))
        weight, bias = params
        value = batched_linear(x, weight, bias).unflatten(1, batch)
        return value if self.scale is None else value * self.scale

    def value(self, latent: Tensor, action: Tensor | None = None) -> Tensor:
        """Pessimistic value, the minimum over the members ``[..., 1]``."""
        return self(latent, action).amin(0)


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


class _ActWithNoise(nn.Module):
    """``Actor.act`` with the next step of a noise."""

    def __init__(self, actor: Actor, noise: PinkNoise) -> None:
        super().__init__()
        self.actor, self.noise = actor, noise

    def forward(self, latent: Tensor) -> Tensor:
        return self.actor.act(latent, self.noise())


class _MinValue(nn.Module):
    """``CriticEnsemble.value`` as a module of its own."""

    def __init__(self, critics: CriticEnsemble) -> None:
        super().__init__()
        self.critics = critics

    def forward(self, latent: Tensor, action: Tensor | None = None) -> Tensor:
        return self.critics.value(latent, action)


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


class _SoftStep(nn.Module):
    """``WorldModel.soft_step`` as a module of its own."""

    def __init__(self, world_model: WorldModel) -> None:
        super().__init__()
        self.world_model = world_model

    def forward(self, latent: Tensor, action: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.world_model.soft_step(latent, action, task)


def world_model_module(
    world_model: WorldModel,
    *,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    next_latent: NestedKey = ("next", "latent"),
    reward: NestedKey = ("next", "reward"),
    terminated: NestedKey = ("next", "terminated"),
    task: NestedKey | None = None,
    soft: bool = False,
) -> TensorDictModule:
    """One imagined step: ``latent``, ``action`` (and ``task``) -> ``next_latent``, ``reward``, ``terminated``.

    With ``soft``, ``terminated`` is the probability of a termination instead of a decision.
    """
    in_keys = [latent, action] if task is None else [latent, action, task]
    step = _SoftStep(world_model) if soft else world_model
    return TensorDictModule(step, in_keys=in_keys, out_keys=[next_latent, reward, terminated])


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


def action_value_module(
    critics: CriticEnsemble,
    *,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    action_value: NestedKey = "state_action_value",
) -> TensorDictModule:
    """``latent``, ``action`` -> ``action_value`` ``[..., 1]``, the minimum over an ensemble of Q functions."""
    return TensorDictModule(_MinValue(critics), in_keys=[latent, action], out_keys=[action_value])


def value_module(
    critics: CriticEnsemble,
    *,
    latent: NestedKey = "latent",
    state_value: NestedKey = "state_value",
) -> TensorDictModule:
    """``latent`` -> ``state_value`` ``[..., 1]``, the minimum over the ensemble."""
    return TensorDictModule(_MinValue(critics), in_keys=[latent], out_keys=[state_value])


def exploring_policy_module(world_model: WorldModel | None, actor: Actor, noise: PinkNoise) -> TensorDictSequential:
    """``observation`` -> ``latent`` -> ``action`` with a noise of its own, whatever TorchRL's exploration type is."""
    act = TensorDictModule(_ActWithNoise(actor, noise), in_keys=["latent"], out_keys=["action"])
    return TensorDictSequential(encoder_module(world_model), act)


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
