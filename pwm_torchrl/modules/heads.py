"""Encoder and heads of a world model, and the two-hot encoding of scalars."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.layers import SimNorm, cat_features, init_world_model_weights, normed_mlp

# Two-hot encoding of scalars in symlog space, as in TD-MPC2 and DreamerV3 ---------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """``sign(x) · log(1 + |x|)``, elementwise (https://arxiv.org/abs/2301.04104, eq. 9)."""
    # The logarithm is computed in double: float32 results differ by an ulp between math libraries, and scaling to 100
    # bins multiplies the difference by 100.
    return x.sign() * (1 + x.abs()).double().log().to(x.dtype)


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


class TwoHotCodec(nn.Module):
    """Encodes scalars as weights on two neighbouring bins of ``linspace(vmin, vmax, num_bins)`` in symlog space.

    It interpolates in symlog space, as TD-MPC2 does (TorchRL's two-hot helpers interpolate in raw space).

    Args:
        num_bins (int): number of bins, at least 2. Defaults to ``101``.
        vmin (float): lowest bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest bin, symlog space. Defaults to ``10.0``.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.modules import TwoHotCodec
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
        """Two-hot weights ``[..., num_bins]`` of raw scalars ``[..., 1]``; out-of-range values are clamped."""
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


# Observation encoder h(o, e) -> z -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """MLP of :class:`NormedLinear` that ends in SimNorm; its input is [o, e].

    Args:
        observation_dim (int): ``O``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        latent_dim (int): ``D``.
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
    """

    def __init__(
        self,
        observation_dim: int,
        task_dim: int,
        units: Sequence[int],
        latent_dim: int,
        simnorm_dim: int = 8,
    ) -> None:
        super().__init__()
        self.net = normed_mlp(observation_dim + task_dim, units, latent_dim, SimNorm(simnorm_dim))

    def forward(self, observation: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Latent ``[..., D]`` of observations ``[..., O]``."""
        return self.net(cat_features(observation, task_embedding))


# Reward and termination heads -----------------------------------------------------------------------------------------


REWARD_SPACES = ("raw", "symlog")


class RewardHead(nn.Module):
    """Reward head R(z, a, e) -> logits, with decoding and loss; the last layer's weight starts at zero.

    Subclasses define the meaning of the logits. Shapes: latent ``[..., D]``, action ``[..., A]``, task embedding
    ``[..., E]``.

    Args:
        in_features (int): D + E + A.
        units (sequence of int): hidden widths.
        out_features (int): number of logits.
    """

    def __init__(self, in_features: int, units: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.net = normed_mlp(in_features, units, out_features, head=None)
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Re-initialise the network."""
        self.net.apply(init_world_model_weights)
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]

    def in_space(self, reward: Tensor) -> Tensor:
        """Convert raw rewards to the space of decoded ones, so that both can be summed in one return; identity here."""
        return reward

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Logits ``[..., num_logits]``."""
        return self.net(cat_features(latent, task_embedding, action))

    def decode(self, logits: Tensor) -> Tensor:
        """The reward ``[..., 1]`` that the policy maximises."""
        raise NotImplementedError

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        """Elementwise loss ``[..., 1]`` against raw rewards ``[..., 1]``."""
        raise NotImplementedError


class ScalarRewardHead(RewardHead):
    """Predicts the reward as one number in units of ``scale``; the loss is the squared error in these units.

    Args:
        in_features (int): D + E + A.
        units (sequence of int): hidden widths.
        scaled (bool): whether the head has a ``scale``, set by :meth:`rescale`; else the unit is 1. Defaults to
            ``False``.
    """

    scale: Tensor | None

    def __init__(self, in_features: int, units: Sequence[int], scaled: bool = False) -> None:
        super().__init__(in_features, units, 1)
        self.register_buffer("scale", torch.ones(1) if scaled else None)

    def decode(self, logits: Tensor) -> Tensor:
        return logits if self.scale is None else logits * self.scale

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        return (logits - (reward if self.scale is None else reward / self.scale)).square()

    def rescale(self, scale: Tensor) -> None:
        """Change the unit to ``scale`` ``[1]``; decoded rewards do not change."""
        if self.scale is not None:
            rescale(self.scale, scale, [self.net[-1].weight, self.net[-1].bias])  # type: ignore[list-item]


@torch.no_grad()
def rescale(scale: Tensor, new: Tensor, last_layer: Sequence[Tensor]) -> None:
    """Set ``scale`` to ``new`` and divide a linear layer's tensors so that output · scale does not change.

    Pop-Art without the shift, https://arxiv.org/abs/1602.07714.
    """
    for tensor in last_layer:
        tensor.mul_(scale / new)
    scale.copy_(new)


class TwoHotRewardHead(RewardHead):
    """Logits over symlog bins, trained with soft cross-entropy (see :class:`TwoHotCodec`).

    Args:
        in_features (int): D + E + A.
        units (sequence of int): hidden widths.
        num_bins (int): number of bins. Defaults to ``101``.
        vmin (float): lowest bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest bin, symlog space. Defaults to ``10.0``.
        space (str): ``"raw"`` decodes through symexp; ``"symlog"`` leaves the expectation in symlog space, which PWM's
            policy maximises in multi-task runs. Defaults to ``"raw"``.
    """

    def __init__(
        self,
        in_features: int,
        units: Sequence[int],
        num_bins: int = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        space: str = "raw",
    ) -> None:
        super().__init__(in_features, units, num_bins)
        if space not in REWARD_SPACES:
            raise ConfigurationError(f"model.reward_space={space!r} is not one of {', '.join(REWARD_SPACES)}.")
        self.codec = TwoHotCodec(num_bins, vmin, vmax)
        self.space = space

    def in_space(self, reward: Tensor) -> Tensor:
        return symlog(reward) if self.space == "symlog" else reward

    def decode(self, logits: Tensor) -> Tensor:
        return self.codec.decode(logits, self.space)

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        return self.codec.cross_entropy(logits, reward)


class TerminationHead(nn.Module):
    """Predicts from z' whether the transition (z, a) -> z' ended the episode; trained with binary cross-entropy.

    Args:
        in_features (int): D + E.
        units (sequence of int): hidden widths.
        threshold (float): probability from which :meth:`terminated` is true. Defaults to ``0.5``.
    """

    def __init__(self, in_features: int, units: Sequence[int], threshold: float = 0.5) -> None:
        super().__init__()
        self.net = normed_mlp(in_features, units, 1, head=None)
        self.threshold = threshold

    def forward(self, next_latent: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Logit ``[..., 1]``."""
        return self.net(cat_features(next_latent, task_embedding))

    def terminated(self, logit: Tensor) -> Tensor:
        """Whether the probability reaches the threshold, bool ``[..., 1]``; carries no gradient."""
        return logit.detach().sigmoid() >= self.threshold

    def loss(self, logit: Tensor, terminated: Tensor) -> Tensor:
        """Elementwise binary cross-entropy ``[..., 1]`` against booleans ``[..., 1]``."""
        return F.binary_cross_entropy_with_logits(logit, terminated.to(logit.dtype), reduction="none")
