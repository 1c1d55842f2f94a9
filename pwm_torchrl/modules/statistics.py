"""Running statistics that are part of a model's state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics(nn.Module):
    """Running population mean and variance over all samples seen (Chan et al., parallel update).

    The count starts at ``epsilon``, the mean at 0 and the variance at 1, so that a first batch nearly replaces them.

    Args:
        shape (tuple of int): feature shape. Defaults to ``(1,)``.
        epsilon (float): initial count. Defaults to ``1e-4``.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (1,), epsilon: float = 1e-4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(float(epsilon), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Fold in samples ``[..., *shape]``; leading dimensions are samples."""
        mean, var, count = self.updated(x)
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.count.copy_(count)

    @torch.no_grad()
    def updated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, var, count) after folding in ``x``, leaving the module as it is."""
        x = x.detach().reshape(-1, *self.mean.shape).to(self.mean.dtype)
        n = x.shape[0]
        total = self.count + n
        delta = x.mean(0) - self.mean
        fraction = (n / total).to(self.mean.dtype)
        mean = self.mean + delta * fraction
        var = (
            self.var * (1 - fraction) + x.var(0, unbiased=False) * fraction + delta.square() * fraction * (1 - fraction)
        )
        return mean, var, total

    def normalize(self, x: Tensor, epsilon: float = 1e-5) -> Tensor:
        """(x − mean) / sqrt(var + ε)."""
        return (x - self.mean) * torch.rsqrt(self.var + epsilon)


class RewardScale(nn.Module):
    """Running scale of rewards: the standard deviation of the discounted return collected so far.

    Rewards are divided by it and never shifted: a shift would change which policy is best under termination.

    Args:
        num_envs (int): parallel environments.
        gamma (float): discount. Defaults to ``0.99``.
    """

    returns: Tensor

    def __init__(self, num_envs: int, gamma: float = 0.99) -> None:
        super().__init__()
        self.gamma = gamma
        self.statistics = RunningStatistics()
        self.register_buffer("returns", torch.zeros(num_envs, 1))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor) -> None:
        """Fold in rewards and done flags ``[N, T, 1]`` of consecutive steps."""
        history = []
        for r, d in zip(reward.unbind(1), done.unbind(1), strict=True):
            self.returns.mul_(self.gamma).add_(r)
            history.append(self.returns.clone())
            self.returns.masked_fill_(d, 0.0)
        self.statistics.update(torch.cat(history))

    def forward(self, reward: Tensor) -> Tensor:
        """Scaled rewards, same shape."""
        return reward * torch.rsqrt(self.statistics.var + 1e-8)
