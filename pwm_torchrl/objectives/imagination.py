"""Imagined rollouts, time-major ``[H, B, ...]``: the rollout itself, its return, value targets and entropy.

Pure functions of tensors, so that they compile as one graph. In shapes, H is the horizon, B batch, D latent, A action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torchrl.objectives.value.functional import td_lambda_return_estimate

from pwm_torchrl.objectives.base import check_same_shape, check_shape

# Returns and value targets over imagined rollouts, time-major ``[H, B, 1]`` -------------------------------------------


def alive_before(terminated: Tensor) -> Tensor:
    """Probability that no earlier step ended the rollout: ∏(1 − p), which is 1 or 0 if ``terminated`` is bool.

    Args:
        terminated (Tensor): ``[H, B, 1]``; entry t says whether the transition t -> t+1 ended the rollout (bool), or
            the probability that it did (float).

    Returns:
        Float ``[H + 1, B, 1]``; entry t belongs to state t.
    """
    if terminated.dtype == torch.bool:
        going = (~terminated).to(torch.get_default_dtype()).cumprod(0)
    else:
        going = (1 - terminated).cumprod(0)
    return torch.cat([torch.ones_like(going[:1]), going], 0)


def discounts(gamma: float, steps: int, like: Tensor) -> Tensor:
    """γ^0 .. γ^(steps − 1) as ``[steps, 1, 1]``."""
    return gamma ** torch.arange(steps, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def rollout_return(reward: Tensor, terminated: Tensor, final_value: Tensor, gamma: float) -> Tensor:
    """J = Σ_{t<H} γ^t r_t + γ^H V(z_H) per rollout; rewards and value after a termination count as 0.

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
    r"""TD(λ) targets of every state of a rollout, gradients stopped.

    .. math::

        \hat V_t = r_t + \gamma \big( (1 - \lambda) V(z_{t+1}) + \lambda \hat V_{t+1} \big), \qquad \hat V_H = V(z_H)

    Args:
        reward (Tensor): ``[H, B, 1]``.
        next_value (Tensor): V(z_{t+1}) ``[H, B, 1]``.
        terminated (Tensor): bool ``[H, B, 1]``; the value after a termination counts as 0.
        gamma (float): discount.
        lmbda (float): λ.
        done (Tensor, optional): bool ``[H, B, 1]``, terminations and truncations, where the λ-return stops and
            bootstraps. Defaults to ``terminated``.

    Returns:
        ``[H, B, 1]``.

    Raises:
        ValueError: for shapes other than these.
    """
    check_shape("reward", reward, (None, None, 1))
    check_same_shape("next_value", next_value, "reward", reward)
    check_same_shape("terminated", terminated, "reward", reward)
    if not reward.numel():  # a share of a batch may be empty, which TorchRL's estimate does not support
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


# Entropy of a Gaussian that is squashed by tanh -----------------------------------------------------------------------


def squashed_entropy(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """One-sample estimate of the entropy of tanh(loc + scale · noise), per action dimension and up to a constant.

    It is the Gaussian's entropy, log(scale), plus log(1 − tanh²(u)) with u = loc + scale · noise. Its gradient is that
    of −log π(a) along the sample (https://arxiv.org/abs/1812.05905, appendix C).

    Args:
        loc (Tensor): mean before tanh ``[..., A]``.
        scale (Tensor): standard deviation before tanh ``[..., A]``.
        noise (Tensor): standard normal ``[..., A]``.
    """
    u = loc + scale * noise
    # log(1 - tanh(u)^2) itself is -inf in float32 from |u| = 9 on.
    return scale.log() - 2 * (u + softplus(-2 * u))


# Imagined rollouts, which policy learning back-propagates through -----------------------------------------------------


#: (latent [B, D], action [B, A]) -> (next latent [B, D], reward [B, 1], terminated bool [B, 1])
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
#: (latent [B, D], standard normal noise [B, A] or None) -> action [B, A]
Policy = Callable[[Tensor, "Tensor | None"], Tensor]


class Imagined(NamedTuple):
    """An imagined rollout; ``latent[t]``, ``actions[t]`` -> ``latent[t + 1]``, ``reward[t]``, ``terminated[t]``."""

    latent: Tensor  # [H + 1, B, D]
    actions: tuple[Tensor, ...]  # H times [B, A]; not stacked, so that each step's gradient can be taken
    reward: Tensor  # [H, B, 1]
    terminated: Tensor  # bool [H, B, 1]

    @property
    def action(self) -> Tensor:
        """Actions ``[H, B, A]``."""
        return torch.stack(self.actions)


def imagine(
    step: Step,
    policy: Policy,
    start: Tensor,
    horizon: int,
    noise: Tensor | None = None,
    detach_policy_input: bool = True,
) -> Imagined:
    """Roll a policy out in a model.

    Args:
        step (callable): transition function of a learned model or of a differentiable environment.
        policy (callable): latent, noise -> action.
        start (Tensor): z_0 ``[B, D]``.
        horizon (int): ``H``.
        noise (Tensor, optional): standard normal ``[H, B, A]``, drawn in advance so that splitting the batch does not
            change it. Defaults to ``None``, a deterministic policy.
        detach_policy_input (bool): stop the gradient at the policy's input, as PWM does, so that no gradient flows
            through the policy's dependence on the latent. Defaults to ``True``.

    Returns:
        :class:`Imagined`.
    """
    latents, actions, rewards, ends = [start], [], [], []
    z = start
    for t in range(horizon):
        a = policy(z.detach() if detach_policy_input else z, None if noise is None else noise[t])
        z, r, ended = step(z, a)
        latents.append(z)
        actions.append(a)
        rewards.append(r)
        ends.append(ended)
    return Imagined(torch.stack(latents), tuple(actions), torch.stack(rewards), torch.stack(ends))
