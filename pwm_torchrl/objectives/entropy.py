"""Entropy of a Gaussian that is squashed by tanh."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def squashed_entropy(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """One-sample estimate of the entropy of tanh(loc + scale · noise), per action and but for a constant.

    That of the Gaussian, log(scale), plus the mean of log(1 − tanh²(u)); its gradient is that of −log π(a) along the
    sample (https://arxiv.org/abs/1812.05905, appendix C).

    Args:
        loc (Tensor): mean before tanh ``[..., A]``.
        scale (Tensor): standard deviation before tanh ``[..., A]``.
        noise (Tensor): standard normal ``[..., A]``.
    """
    u = loc + scale * noise
    # log(1 - tanh(u)^2) itself is -inf in float32 from |u| = 9 on.
    return scale.log() - 2 * (u + softplus(-2 * u))
