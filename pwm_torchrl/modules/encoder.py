"""Observation encoder h(o, e) -> z."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pwm_torchrl.modules.layers import SimNorm, cat_features, normed_mlp


class Encoder(nn.Module):
    """MLP of :class:`NormedLinear` that ends in SimNorm; inputs concatenated as [o, e].

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
