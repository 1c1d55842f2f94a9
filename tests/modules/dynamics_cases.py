"""Small dynamics and latents for their tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_torchrl.modules import (
    Dynamics,
    make_dynamics,
)

D, A, E, V = 16, 3, 4, 8
VARIANTS = {"v1": ("heun", 2), "v2": ("heun", 4), "v3": ("euler", 8)}
FLOWS = ("residual_endpoint", "tangent", "simnorm_velocity")
CONDITIONED = {"condition_on_start": True, "time_features": 2}


def dynamics(kind: str = "flow", task_dim: int = 0, **kwargs: object) -> Dynamics:
    return make_dynamics(kind, D, A, task_dim, [24, 24], V, **kwargs)


def latents(*batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*batch, D // V, V, dtype=dtype).softmax(-1).flatten(-2)


def group_sums(z: Tensor) -> Tensor:
    return z.unflatten(-1, (-1, V)).sum(-1)


def randomize(module: torch.nn.Module, scale: float, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module
