"""The seeding contract: one seed determines a run on the CPU.

The generators of Python, NumPy and PyTorch get ``seed``. Training environment i gets ``seed · 10 000 + i`` and
evaluation environment i ``seed · 10 000 + 5000 + i``, so that runs with neighbouring seeds share no environment.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_STRIDE = 10_000


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def training_env_seed(seed: int) -> int:
    """Seed of the first training environment."""
    return seed * _STRIDE


def evaluation_env_seed(seed: int) -> int:
    """Seed of the first evaluation environment."""
    return seed * _STRIDE + _STRIDE // 2
