"""What the world model predicts beside the next latent: reward and termination."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.layers import cat_features, init_world_model_weights, normed_mlp
from pwm_torchrl.modules.two_hot import TwoHotCodec

REWARD_SPACES = ("raw", "symlog")


class RewardHead(nn.Module):
    """Reward R(z, a, e) -> logits, its decoding and its loss; the last layer starts at zero.

    Subclasses say what a logit means. Shapes: latent ``[..., D]``, action ``[..., A]``, task embedding ``[..., E]``.

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
        """Initialise anew."""
        self.net.apply(init_world_model_weights)
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Logits ``[..., num_logits]``."""
        return self.net(cat_features(latent, task_embedding, action))

    def decode(self, logits: Tensor) -> Tensor:
        """Reward ``[..., 1]`` that the policy maximises."""
        raise NotImplementedError

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        """Elementwise loss ``[..., 1]`` against raw rewards ``[..., 1]``."""
        raise NotImplementedError


class ScalarRewardHead(RewardHead):
    """The single logit is the reward; the loss is its squared error."""

    def __init__(self, in_features: int, units: Sequence[int]) -> None:
        super().__init__(in_features, units, 1)

    def decode(self, logits: Tensor) -> Tensor:
        return logits

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        return (logits - reward).square()


class TwoHotRewardHead(RewardHead):
    """Logits over symlog bins, trained by soft cross-entropy (see :class:`TwoHotCodec`).

    Args:
        in_features (int): D + E + A.
        units (sequence of int): hidden widths.
        num_bins (int): number of bins. Defaults to ``101``.
        vmin (float): lowest bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest bin, symlog space. Defaults to ``10.0``.
        space (str): ``"raw"`` decodes through symexp, ``"symlog"`` leaves the expectation in symlog space, as PWM's
            policy maximises it in multi-task runs. Defaults to ``"raw"``.
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

    def decode(self, logits: Tensor) -> Tensor:
        return self.codec.decode(logits, self.space)

    def loss(self, logits: Tensor, reward: Tensor) -> Tensor:
        return self.codec.cross_entropy(logits, reward)


class TerminationHead(nn.Module):
    """Probability that the transition (z, a) -> z' ends the episode, from z'; trained by binary cross-entropy.

    Args:
        in_features (int): D + E.
        units (sequence of int): hidden widths.
        threshold (float): probability from which imagination counts a rollout as ended. Defaults to ``0.5``.
    """

    def __init__(self, in_features: int, units: Sequence[int], threshold: float = 0.5) -> None:
        super().__init__()
        self.net = normed_mlp(in_features, units, 1, head=None)
        self.threshold = threshold

    def forward(self, next_latent: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Logit ``[..., 1]``."""
        return self.net(cat_features(next_latent, task_embedding))

    def terminated(self, logit: Tensor) -> Tensor:
        """Boolean ``[..., 1]``; carries no gradient."""
        return logit.detach().sigmoid() >= self.threshold

    def loss(self, logit: Tensor, terminated: Tensor) -> Tensor:
        """Elementwise binary cross-entropy ``[..., 1]`` against booleans ``[..., 1]``."""
        return F.binary_cross_entropy_with_logits(logit, terminated.to(logit.dtype), reduction="none")
