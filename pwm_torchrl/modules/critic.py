"""Ensemble of value functions on latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.modules.layers import policy_mlp


class CriticEnsemble(nn.Module):
    """K value MLPs evaluated together, their parameters stacked along a first dimension.

    Blocks of Linear -> Mish -> LayerNorm, orthogonal initialisation with gain √2. ``params[n]`` is the n-th parameter
    of one MLP in definition order, stacked over the ensemble, so that a batched matrix product serves all members.

    Args:
        latent_dim (int): ``D``.
        units (sequence of int): hidden widths. Defaults to ``(400, 200)``.
        num_critics (int): ``K``. Defaults to ``3``.

    Examples:
        >>> CriticEnsemble(16)(torch.zeros(5, 16)).shape
        torch.Size([3, 5, 1])
    """

    def __init__(self, latent_dim: int, units: Sequence[int] = (400, 200), num_critics: int = 3) -> None:
        super().__init__()
        self.latent_dim, self.units, self.num_critics = latent_dim, tuple(units), num_critics
        self.params = nn.ParameterList(nn.Parameter(stack) for stack in self._initial())

    def _initial(self) -> list[Tensor]:
        members = [policy_mlp(self.latent_dim, self.units, 1) for _ in range(self.num_critics)]
        return [torch.stack([p.detach() for p in stack]) for stack in zip(*(m.parameters() for m in members))]

    def reset_parameters(self) -> None:
        """Initialise anew."""
        with torch.no_grad():
            for parameter, value in zip(self.params, self._initial(), strict=True):
                parameter.copy_(value)

    def forward(self, latent: Tensor) -> Tensor:
        """Values ``[K, ..., 1]`` of latents ``[..., D]``, one per member."""
        return self._evaluate(list(self.params), latent)

    def one_by_one(self, latent: Tensor) -> Tensor:
        """The same values, from a loop over the members instead of batched products."""
        params = list(self.params)
        return torch.cat([self._evaluate([p[k : k + 1] for p in params], latent) for k in range(self.num_critics)])

    @staticmethod
    def _evaluate(params: list[Tensor], latent: Tensor) -> Tensor:
        batch = latent.shape[:-1]
        x = latent.reshape(-1, latent.shape[-1]).expand(params[0].shape[0], -1, -1)
        while len(params) > 2:
            weight, bias, scale, shift, *params = params
            x = F.mish(torch.baddbmm(bias.unsqueeze(1), x, weight.mT))
            x = F.layer_norm(x, x.shape[-1:]) * scale.unsqueeze(1) + shift.unsqueeze(1)
        weight, bias = params
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT).unflatten(1, batch)

    def value(self, latent: Tensor) -> Tensor:
        """Pessimistic value min_k V_k ``[..., 1]``."""
        return self(latent).amin(0)
