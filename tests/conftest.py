"""Options of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# Timing says nothing about correctness, and a shared machine is slow at times.
settings.register_profile("pwm", deadline=None)
settings.load_profile("pwm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden cases that `-m golden` compares against (default: tests/golden)",
    )
