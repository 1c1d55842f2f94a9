"""Quality measures of networks: pure functions of networks and data, for the metrics of runs and for benchmarks.

Nothing here changes a network or draws from the process-wide random generators. Tensors are time-major, ``[H, B, ...]``
or, for whole episodes, ``[T, N, ...]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.modules import WorldModel
from pwm_torchrl.modules.heads import symlog
from pwm_torchrl.objectives.model_loss import Slices
from pwm_torchrl.objectives.soft_actor_loss import SATURATED, squashed_log_prob

__all__ = [
    "StartDependence",
    "ValueQuality",
    "effective_rank",
    "latent_variance",
    "rollout_errors",
    "saturated_share",
    "start_dependence",
    "termination_shares",
    "value_quality",
    "within_tasks",
]

# Latents --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_variance(latent: Tensor) -> Tensor:
    """Variance over the batch of latents ``[B, D]``, mean over features; a scalar."""
    return latent.var(0, unbiased=False).mean()


@torch.no_grad()
def effective_rank(latent: Tensor) -> Tensor:
    """Effective rank of centred latents ``[B, D]``: exp of the entropy of their normalised singular values; a scalar.

    From Roy and Vetterli, "The effective rank" (EUSIPCO 2007). It is at most min(B − 1, D), and 0 if all latents are
    equal.
    """
    singular = torch.linalg.svdvals((latent - latent.mean(0)).double())
    total = singular.sum()
    if total <= 1e-6 * latent.double().norm():  # only rounding errors are left if all latents are equal
        return torch.zeros((), dtype=latent.dtype, device=latent.device)
    return torch.special.entr(singular / total).sum().exp().to(latent.dtype)


@torch.no_grad()
def within_tasks(latent: Tensor, task: Tensor) -> Tensor:
    """Latents ``[B, D]`` minus the mean of their task, which leaves only the differences within tasks.

    Args:
        latent (Tensor): ``[B, D]``.
        task (Tensor): index ``[B]``.
    """
    centred = latent.clone()
    for index in task.unique():
        rows = task == index
        centred[rows] -= latent[rows].mean(0)
    return centred


# Predictions of the model ---------------------------------------------------------------------------------------------


@contextmanager
def not_compiled(model: Any) -> Iterator[None]:
    """Evaluate the dynamics network uncompiled: each new batch size would compile it again."""
    dynamics = getattr(model, "dynamics", None)
    piece = getattr(dynamics, "piece", None)
    if piece is None:
        yield
        return
    dynamics.piece = None
    try:
        yield
    finally:
        dynamics.piece = piece


@torch.no_grad()
def rollout_errors(
    model: WorldModel,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor,
    task: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Open-loop errors of the model at every step of a rollout, averaged over the batch.

    Args:
        model (WorldModel): the model.
        observation (Tensor): first observations ``[B, O]``.
        action (Tensor): ``[H, B, A]``.
        next_observation (Tensor): ``[H, B, O]``.
        reward (Tensor): ``[H, B, 1]``, scaled as in the model's training.
        task (Tensor, optional): index ``[B]``, for multi-task models.
        valid (Tensor, optional): bool ``[H, B, 1]``, false after an episode's end. Defaults to ``None``, all valid.

    Returns:
        tuple: squared errors of latent and reward, each ``[H]``; NaN at a step that no slice reaches.
    """
    target, z = model.encode(next_observation, task), model.encode(observation, task)
    latent_error, reward_error = [], []
    codec = getattr(model.reward, "codec", None)  # a two-hot head may decode to symlog rewards, only for the policy
    with not_compiled(model):
        for t in range(len(action)):
            rows = slice(None) if valid is None else valid[t].squeeze(-1)
            z, logits, _ = model.predict(z, action[t], task)
            latent_error.append((z - target[t])[rows].square().mean())
            predicted = model.reward.decode(logits) if codec is None else codec.decode(logits)
            reward_error.append((predicted - reward[t])[rows].square().mean())
    return torch.stack(latent_error), torch.stack(reward_error)


@torch.no_grad()
def termination_shares(model: WorldModel, slices: Slices, soft: bool = True) -> tuple[Tensor, Tensor]:
    """Fractions of slices that terminate: as the model predicts, and in the data.

    The model is rolled out from the first observation with the slice's actions, up to the episode's real end.

    Args:
        model (WorldModel): the model; without a termination head it predicts no terminations.
        slices (Slices): H steps of B slices.
        soft (bool): a rollout terminates with probability 1 − ∏(1 − p_t); if false, where p_t reaches the head's
            threshold, as in the published algorithm. Defaults to ``True``.

    Returns:
        tuple: two scalars between 0 and 1.
    """
    z = model.encode(slices.observation, slices.task)
    going = torch.ones_like(slices.reward[0])
    with not_compiled(model):
        for action, valid in zip(slices.action, slices.valid, strict=True):
            z, _, ended = (model.soft_step if soft else model)(z, action, slices.task)
            going = torch.where(valid, going * (1 - ended.to(going.dtype)), going)
    return (1 - going).mean(), (slices.terminated & slices.valid).any(0).to(going.dtype).mean()


class StartDependence(NamedTuple):
    """How much latents still depend on the start after 1..H imagined steps."""

    variance: Tensor  # [H], variance over the starts, relative to that of z_0; NaN if that is 0
    gradient: Tensor  # [H], norm of d z_h / d z_0, relative to that of the identity


def start_dependence(model: WorldModel, observation: Tensor, action: Tensor, probes: int = 4) -> StartDependence:
    """Measures how much imagined latents still depend on their start.

    All rollouts take the same actions, so that their latents differ only because of the starts. The gradient is the
    Frobenius norm of the Jacobian over sqrt(D), root mean square over the starts, estimated with random signs
    (Hutchinson) from a separate generator.

    Args:
        model (WorldModel): single-task.
        observation (Tensor): starts ``[B, O]``.
        action (Tensor): one sequence of actions ``[H, A]``.
        probes (int): random vectors per start and step. Defaults to ``4``.
    """
    with torch.no_grad():
        start = model.encode(observation)
    generator = torch.Generator().manual_seed(0)
    variances, gradients = [], []
    with torch.enable_grad(), not_compiled(model):
        leaf = start.requires_grad_()
        z = leaf
        for a in action:
            z = model.predict(z, a.expand(len(z), -1))[0]
            variances.append(latent_variance(z.detach()))
            squares = []
            for _ in range(probes):
                signs = (torch.randint(0, 2, z.shape, generator=generator) * 2 - 1).to(z)
                (gradient,) = torch.autograd.grad(z, leaf, signs, retain_graph=True)
                squares.append(gradient.square().sum(-1).mean())
            gradients.append((torch.stack(squares).mean() / z.shape[-1]).sqrt())
    return StartDependence(torch.stack(variances) / latent_variance(start.detach()), torch.stack(gradients))


# Actions and values ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def saturated_share(action: Tensor, valid: Tensor) -> Tensor:
    """Fraction of actions ``[T, N, A]`` in which tanh has almost no gradient left, over valid steps; a scalar."""
    return (action[valid.squeeze(-1)].abs() > SATURATED).float().mean()


class ValueQuality(NamedTuple):
    """Predicted values of visited states and actions, and their realised returns; scalars."""

    predicted: Tensor  # mean value
    realised: Tensor  # mean discounted return
    error: Tensor  # root mean squared difference, divided by the root mean square of the returns or by one unit of the
    # critics, whichever is larger


@torch.no_grad()
def value_quality(
    networks: Networks,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor,
    valid: Tensor,
    terminated: Tensor,
    gamma: float,
) -> ValueQuality:
    """Compares values with realised discounted returns, over the first half of each episode.

    A truncated episode's return ends in the critics' own value of its last state, so short episodes hide errors. If the
    actor has a temperature, the returns include the entropies that are in the critics' targets, estimated with one
    sample per state from a separate generator.

    Args:
        networks (Networks): actor, critic and, unless those take observations, the model.
        observation (Tensor): ``[T, N, O]``.
        action (Tensor): ``[T, N, A]``.
        next_observation (Tensor): ``[T, N, O]``.
        reward (Tensor): ``[T, N, 1]``, scaled as in the critics' training.
        valid (Tensor): bool ``[T, N, 1]``, false after an episode's end.
        terminated (Tensor): bool ``[T, N, 1]``.
        gamma (float): discount.
    """
    actor, critic, model = networks.actor, networks.critic, networks.model
    if model is None:
        latent, following = observation, next_observation
    else:
        latent, following = model.encode(observation), model.encode(next_observation)
        reward = symlog(reward) if getattr(model.reward, "space", "raw") == "symlog" else reward
    of_actions = critic.action_dim > 0
    value = critic.value(latent, action if of_actions else None)
    last_value = critic.value(following, actor.act(following) if of_actions else None)
    unit = torch.ones_like(reward[0, 0]) if critic.scale is None else critic.scale
    bonus = torch.zeros_like(reward)
    if actor.temperature is not None:
        mean, std = actor(following)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        bonus = -actor.temperature * unit * squashed_log_prob(mean + std * noise, std, noise)
    last = valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    returns = torch.empty_like(reward)
    running = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        after = torch.where(last[t], last_value[t], running)
        running = reward[t] + gamma * ~terminated[t] * (bonus[t] + after)
        returns[t] = running
    steps = torch.arange(len(valid), device=valid.device).view(-1, 1, 1)
    first_half = steps < (valid.sum(0) + 1) // 2
    value, returns = value[first_half], returns[first_half]
    size = torch.maximum(returns.square().mean().sqrt(), unit.squeeze())
    return ValueQuality(value.mean(), returns.mean(), (value - returns).square().mean().sqrt() / size)
