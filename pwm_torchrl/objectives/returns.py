"""Returns and value targets over imagined rollouts, time-major ``[H, B, 1]``."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.objectives.value.functional import td_lambda_return_estimate

from pwm_torchrl.objectives.shapes import check_same_shape, check_shape


def alive_before(terminated: Tensor) -> Tensor:
    """1 where no earlier step ended the rollout, else 0.

    Args:
        terminated (Tensor): bool ``[H, B, 1]``; entry t says that the transition t -> t+1 ended the rollout.

    Returns:
        Float ``[H + 1, B, 1]``; entry t belongs to the state t.
    """
    going = (~terminated).to(torch.get_default_dtype()).cumprod(0)
    return torch.cat([torch.ones_like(going[:1]), going], 0)


def discounts(gamma: float, steps: int, like: Tensor) -> Tensor:
    """γ^0 .. γ^(steps − 1) as ``[steps, 1, 1]``."""
    return gamma ** torch.arange(steps, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def rollout_return(reward: Tensor, terminated: Tensor, final_value: Tensor, gamma: float) -> Tensor:
    """J = Σ_{t<H} γ^t r_t + γ^H V(z_H) per rollout, where the sum stops and V counts 0 after a termination.

    Args:
        reward (Tensor): ``[H, B, 1]``.
        terminated (Tensor): bool ``[H, B, 1]``.
        final_value (Tensor): V(z_H) ``[B, 1]``.
        gamma (float): discount.

    Returns:
        ``[B, 1]``.

    Raises:
        ValueError: for shapes other than these.
    """
    horizon, batch = reward.shape[:2]
    check_shape("reward", reward, (horizon, batch, 1))
    check_same_shape("terminated", terminated, "reward", reward)
    check_shape("final_value", final_value, (batch, 1))
    weight = (alive_before(terminated) * discounts(gamma, horizon + 1, reward)).to(reward.dtype)
    return (reward * weight[:-1]).sum(0) + final_value * weight[-1]


def td_lambda_targets(
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    gamma: float,
    lmbda: float,
    done: Tensor | None = None,
) -> Tensor:
    """TD(λ) targets of every state of a rollout, gradients stopped.

    Args:
        reward (Tensor): ``[H, B, 1]``.
        next_value (Tensor): V(z_{t+1}) ``[H, B, 1]``.
        terminated (Tensor): bool ``[H, B, 1]``; the value after a termination counts 0.
        gamma (float): discount.
        lmbda (float): λ.
        done (Tensor, optional): bool ``[H, B, 1]``, where the λ-return stops and bootstraps: terminations and
            truncations. Defaults to ``terminated``.

    Returns:
        ``[H, B, 1]``.

    Raises:
        ValueError: for shapes other than these.
    """
    check_shape("reward", reward, (None, None, 1))
    check_same_shape("next_value", next_value, "reward", reward)
    check_same_shape("terminated", terminated, "reward", reward)
    if not reward.numel():  # a share of a batch may be empty, and TorchRL's estimate cannot
        return reward.detach()
    return td_lambda_return_estimate(
        gamma,
        lmbda,
        next_value.detach(),
        reward.detach(),
        done=terminated if done is None else done,
        terminated=terminated,
        time_dim=0,
    )
