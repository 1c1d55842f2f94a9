"""How much of the suite runs: a fixed part, or, with ``--robust-full``, the whole product (``make test-robust``)."""

from __future__ import annotations

import pytest

#: Malformed command lines: of CI, of the full product, and how many share a test.
FEW, MANY, TOGETHER = 200, 1000, 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "settings_numbers" in metafunc.fixturenames:
        count = MANY if metafunc.config.getoption("robust_full") else FEW
        ranges = [range(first, first + TOGETHER) for first in range(0, count, TOGETHER)]
        metafunc.parametrize("settings_numbers", ranges, ids=[f"from_{each.start}" for each in ranges])
