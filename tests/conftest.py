"""Options of the whole suite."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import settings

from pwm_torchrl import _pytest_option

# Timing says nothing about correctness, and a shared machine is slow at times.
settings.register_profile("pwm", deadline=None)
settings.load_profile("pwm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    # Where the package is installed, its entry point has done so already.
    with contextlib.suppress(ValueError):
        _pytest_option.pytest_addoption(parser)
