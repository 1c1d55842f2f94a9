"""PWM's dynamics: one MLP that ends in SimNorm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_torchrl.modules.dynamics.base import Dynamics
from pwm_torchrl.modules.layers import SimNorm, cat_features, normed_mlp


class MLPDynamics(Dynamics):
    """z' = SimNorm(MLP([z, e, a])), as in TD-MPC2 and PWM.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        task_dim: int,
        units: Sequence[int],
        simnorm_dim: int = 8,
    ) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        self.net = normed_mlp(latent_dim + task_dim + action_dim, units, latent_dim, SimNorm(simnorm_dim))

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        if self.piece is not None:
            return self.piece([latent, task_embedding, action], self.net, self.simnorm_dim)
        return self.net(cat_features(latent, task_embedding, action))
