"""The seeding contract."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pwm_torchrl.run.collector import (
    RunRNGState,
    evaluation_env_seed,
    fresh_env_seed,
    preserved_generators,
    seed_everything,
    training_env_seed,
)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 1, 20_240_501, 2**40])
def test_environment_seeds_are_apart_and_fit_simulators(seed: int) -> None:
    seeds = [training_env_seed(seed), evaluation_env_seed(seed), fresh_env_seed(seed)]
    assert len(set(seeds)) == 3
    assert all(0 <= s <= 2**32 - 2500 for s in seeds)


def test_evaluations_of_a_run_start_apart() -> None:
    seeds = [evaluation_env_seed(7, epoch, 10) + i for epoch in range(250) for i in range(10)]
    assert len(set(seeds)) == 2500
    assert min(seeds) == evaluation_env_seed(7)
    assert max(seeds) < fresh_env_seed(7)
    assert evaluation_env_seed(7, 250, 10) == evaluation_env_seed(7)


def test_generators_survive_what_happens_in_between() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with preserved_generators():
        seed_everything(99)
        draws()
    assert draws() == expected


def test_the_state_of_absent_accelerators_is_left_out_with_a_warning() -> None:
    seed_everything(5)
    state = RunRNGState().state_dict()
    state["torch_cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    expected = draws()
    with pytest.warns(UserWarning, match=rf"{torch.cuda.device_count() + 1} CUDA devices"):
        RunRNGState().load_state_dict(state)
    assert draws() == expected
