"""The examples run: one iteration of each, with as few updates as there can be."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBER = r"-?\d+\.\d"


@pytest.mark.parametrize("name", ["sac_in_imagination", "ppo_in_imagination"])
def test_one_iteration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "result.json"
    result = module.main(["--iterations", "1", "--quick", "--episodes", "2", "--json", str(file)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(f"before: return {NUMBER} ± {NUMBER}, after: return {NUMBER} ± {NUMBER}", last)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["iterations"] == 1
    assert written["agent_steps"] == 8 * 16
    assert {key: written[key] for key in result} == result
    assert all(math.isfinite(value) and value <= 0 for key, value in result.items() if key in ("before", "after"))
    assert result["after"] != result["before"], "the policy has learned something, good or bad"


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f"`{file.name}`" in table
        assert len(file.read_text(encoding="utf-8").splitlines()) < 200
