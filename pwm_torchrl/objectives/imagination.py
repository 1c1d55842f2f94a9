"""Imagined rollouts: the differentiable core that policy learning back-propagates through.

Pure functions of tensors, so that they compile as one graph. Shapes are time-major: H horizon, B batch, D latent,
A action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: (latent [B, D], action [B, A]) -> (next latent [B, D], reward [B, 1], terminated bool [B, 1])
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
#: (latent [B, D], standard normal noise [B, A] or None) -> action [B, A]
Policy = Callable[[Tensor, "Tensor | None"], Tensor]


class Imagined(NamedTuple):
    """An imagined rollout; ``latent[t]``, ``actions[t]`` -> ``latent[t + 1]``, ``reward[t]``, ``terminated[t]``."""

    latent: Tensor  # [H + 1, B, D]
    actions: tuple[Tensor, ...]  # H times [B, A]; apart, so that a gradient can be taken at each step
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
        step (callable): any transition function, of a learned model or a differentiable environment.
        policy (callable): action from latent and noise.
        start (Tensor): z_0 ``[B, D]``.
        horizon (int): ``H``.
        noise (Tensor, optional): standard normal ``[H, B, A]``, drawn beforehand so that splitting a batch does not
            change it; ``None`` acts deterministically.
        detach_policy_input (bool): stop the gradient at the policy's input (PWM's choice), so that the policy is
            improved through its actions only. Defaults to ``True``.

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
