"""The examples run: one iteration of each, with as few updates as there can be."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBER = r"-?\d+\.\d"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sac_in_imagination", "ppo_in_imagination"])
def test_one_iteration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(name)
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


def test_pwm_in_one_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two iterations, with short episodes and few updates."""
    module = load("pwm")
    small = {"ITERATIONS": 2, "EPISODE_STEPS": 20, "EVAL_ENVS": 2, "FIRST_MODEL_UPDATES": 2, "MODEL_UPDATES": 1}
    for name, value in {**small, "POLICY_UPDATES": 1}.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    result = module.main(["--seed", "3"])
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(f"return ({NUMBER}) ± {NUMBER} before, ({NUMBER}) ± {NUMBER} after", last)
    assert found is not None
    assert [float(number) for number in found.groups()] == [round(result[key], 1) for key in ("before", "after")]
    assert -400 < result["before"] < 0, "20 steps of at most 16.3"
    assert result["before"] != result["after"]
    assert module.main(["--seed", "3"]) == result, "a seed determines a run"


def test_pwm_in_one_file_is_short_and_needs_three_parts_of_ours() -> None:
    text = (EXAMPLES / "pwm.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert set(re.findall(r"^from (pwm_torchrl\S*) import", text, re.MULTILINE)) == {
        "pwm_torchrl.envs",
        "pwm_torchrl.modules",
        "pwm_torchrl.objectives",
    }


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f"`{file.name}`" in table
        assert len(file.read_text(encoding="utf-8").splitlines()) < 200
