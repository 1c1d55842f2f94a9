"""Gaussian-tanh policy on latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwm_torchrl.modules.layers import init_policy_weights, policy_mlp


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
