"""Two-hot coding of scalars in symlog space, as TD-MPC2 and DreamerV3 code rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError


def symlog(x: Tensor) -> Tensor:
    """``sign(x) · log(1 + |x|)``, elementwise (https://arxiv.org/abs/2301.04104, eq. 9)."""
    # The logarithm is taken in double: float32 ones differ by an ulp between math libraries, which a position among 100
    # bins multiplies by as much.
    return x.sign() * (1 + x.abs()).double().log().to(x.dtype)


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


class TwoHotCodec(nn.Module):
    """Codes scalars as weights on two neighbouring bins of ``linspace(vmin, vmax, num_bins)`` in symlog space.

    Interpolation happens in symlog space, as in TD-MPC2 (TorchRL's two-hot helpers interpolate in raw space).

    Args:
        num_bins (int): number of bins, at least 2. Defaults to ``101``.
        vmin (float): lowest bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest bin, symlog space. Defaults to ``10.0``.

    Examples:
        >>> codec = TwoHotCodec(5, -2.0, 2.0)
        >>> codec.encode(torch.tensor([[0.0]]))
        tensor([[0., 0., 1., 0., 0.]])
    """

    bins: Tensor

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0) -> None:
        super().__init__()
        if num_bins < 2 or not vmin < vmax:
            raise ConfigurationError(
                f"A two-hot code needs model.num_bins >= 2 and model.vmin < model.vmax; "
                f"got {num_bins} bins over [{vmin}, {vmax}]."
            )
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax
        self.register_buffer("bins", torch.linspace(vmin, vmax, num_bins), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """Two-hot weights ``[..., num_bins]`` of raw scalars ``[..., 1]``; out-of-range values use the end bins."""
        position = (symlog(x).clamp(self.vmin, self.vmax) - self.vmin) / ((self.vmax - self.vmin) / (self.num_bins - 1))
        low = position.floor().clamp(max=self.num_bins - 2)
        weight = (position - low).clamp(max=1.0)
        index = low.long()
        two_hot = torch.zeros(*x.shape[:-1], self.num_bins, dtype=weight.dtype, device=weight.device)
        return two_hot.scatter(-1, index, 1 - weight).scatter(-1, index + 1, weight)

    def decode(self, logits: Tensor, space: str = "raw") -> Tensor:
        """Expected scalar ``[..., 1]`` of logits ``[..., num_bins]``, in ``"symlog"`` or ``"raw"`` space."""
        value = (F.softmax(logits, -1) * self.bins.to(logits.dtype)).sum(-1, keepdim=True)
        return value if space == "symlog" else symexp(value)

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        """Soft cross-entropy ``[..., 1]`` of logits against the two-hot code of raw scalars ``[..., 1]``."""
        return -(self.encode(x) * F.log_softmax(logits, -1)).sum(-1, keepdim=True)
