"""Agreement with vectors of an independent implementation: one test per expected array of each case in --golden-dir."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import Case, assert_agrees, find_cases
from golden_outputs import COMPUTE
from safetensors.torch import save_file

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "key" not in metafunc.fixturenames:
        return
    cases = find_cases(metafunc.config.getoption("--golden-dir") or Path(__file__).parent)
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


class TestSelection:
    """The suite itself: nothing in a folder is passed over in silence."""

    def test_missing_and_empty_folders_are_errors(self, tmp_path: Path) -> None:
        assert "no golden case" in find_cases(tmp_path)[0].problem
        assert "not a folder" in find_cases(tmp_path / "none")[0].problem

    @pytest.mark.parametrize(
        ("config", "arrays", "problem"),
        [
            ({}, {"a": 1}, "no kind"),
            ({"latent_dim": 8}, {"in.observation": 1, "in.action": 1, "world_model._other.0.weight": 1}, "no kind"),
            ({}, {"in.observation": 1, "in.action": 1, "world_model._dynamics.0.weight": 1, "out.x": 1}, "no kind"),
            ({"x": 1}, {"in.observation": 1, "in.action": 1, "world_model._dynamics.0.weight": 1}, "no expected"),
            ({"activation": "ReLU"}, {"out.latents": 1}, "only Mish"),
        ],
    )
    def test_unknown_kinds_are_errors(self, config: dict, arrays: dict, problem: str, tmp_path: Path) -> None:
        arrays = {key: torch.ones(1) for key in arrays}
        save_file(arrays, tmp_path / "case.safetensors", {"config": json.dumps(config)})
        (case,) = find_cases(tmp_path)
        assert problem in case.problem
        with pytest.raises(pytest.fail.Exception, match=problem):
            test_agrees(case, "unusable")

    def test_unreadable_files_and_lone_checkpoints_are_errors(self, tmp_path: Path) -> None:
        (tmp_path / "broken.safetensors").write_bytes(b"\x08")
        torch.save({"model": {}}, tmp_path / "lone.pt")
        assert [case.problem is not None for case in find_cases(tmp_path)] == [True, True]

    def test_an_array_that_nothing_computes_fails(self) -> None:
        assert Case("case", arrays={"out.new": torch.ones(1)}).expected == ["out.new"]
        case = find_cases(Path(__file__).parent)[0]
        with pytest.raises(AssertionError, match="no check computes"):
            test_agrees(case, "out.new")

    @pytest.mark.parametrize("change", [2e-4, -2e-4])
    def test_tolerance(self, change: float) -> None:
        expected = torch.tensor([1.0, 1e-9])
        assert_agrees("x", expected + 5e-7, expected)
        with pytest.raises(AssertionError, match="x: "):
            assert_agrees("x", expected * (1 + change), expected)
        with pytest.raises(AssertionError, match="shape"):
            assert_agrees("x", expected[:1], expected)
