"""The seeding contract: one seed determines a run on the CPU.

The generators of Python, NumPy and PyTorch get ``seed``. Training environment i gets ``seed · 10 000 + i`` and
evaluation environment i ``seed · 10 000 + 5000 + i`` (``+ 7500`` for evaluations after training), so that runs with
neighbouring seeds share no environment. Evaluating leaves the process-wide generators as they were.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState

_STRIDE = 10_000


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def training_env_seed(seed: int) -> int:
    """Seed of the first training environment; below 2^32, which is what simulators accept."""
    return (seed % (2**32 // _STRIDE)) * _STRIDE


def evaluation_env_seed(seed: int) -> int:
    """Seed of the first environment of the evaluations during training."""
    return training_env_seed(seed) + _STRIDE // 2


def fresh_env_seed(seed: int) -> int:
    """Seed of the first environment of an evaluation afterwards, which training never saw nor chose by."""
    return training_env_seed(seed) + _STRIDE * 3 // 4


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the process-wide generators back afterwards, whatever an environment's seeding did to them."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class RunRNGState(GlobalRNGState):
    """TorchRL's process-wide generator state, loadable on a machine with other accelerators.

    The generators of accelerators are restored only where their number is the same; the others always are.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        saved = dict(state_dict)
        cuda = saved.get("torch_cuda")
        if cuda is not None and len(cuda) != torch.cuda.device_count():
            warnings.warn(
                f"The checkpoint has the random state of {len(cuda)} CUDA devices and there are "
                f"{torch.cuda.device_count()}: theirs starts anew, so the run is not resumed to the bit.",
                stacklevel=2,
            )
            del saved["torch_cuda"]
        super().load_state_dict(saved)
