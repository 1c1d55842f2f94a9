"""Agreement with vectors of an independent implementation: one test per expected array of every case in --golden-dir."""

from __future__ import annotations

import pytest
from golden_cases import Case, assert_agrees, find_cases
from golden_outputs import COMPUTE

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "key" not in metafunc.fixturenames:
        return
    cases = find_cases(metafunc.config.getoption("--golden-dir"))
    metafunc.parametrize(
        ("case", "key"),
        [
            pytest.param(case, key, id=f"{case.name}-{key}")
            for case in cases
            for key in (["unusable"] if case.problem else case.expected)
        ],
    )


def test_agrees(case: Case, key: str) -> None:
    if case.problem:
        pytest.fail(case.problem)
    actual = case.actual(COMPUTE[case.kind])
    assert key in actual, f"{case.name} holds {key}, which no check computes"
    assert_agrees(key, actual[key], case.arrays[key])
