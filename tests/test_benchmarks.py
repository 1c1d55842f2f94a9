"""The benchmarks' committed results are only written when that is asked for; what their tables say."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from training_cases import CLOCKWORK, config, run_with

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``benchmarks/learning.py``."""
    pytest.importorskip("hydra")
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import learning

    return learning


@pytest.fixture
def model_quality(learning: ModuleType) -> ModuleType:
    """``benchmarks/model_quality.py``."""
    from benchmarks import model_quality

    return model_quality


def writing(tree: ast.AST) -> list[ast.AST]:
    """Statements that write below ``benchmarks/results``, with the condition that they stand under."""
    return [
        node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp)) and "publish" in ast.unparse(node.test)
    ]


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_results_are_published_on_demand_alone(script):
    source = script.read_text(encoding="utf-8")
    if '"results"' not in source:
        return
    tree = ast.parse(source)
    published = "\n".join(ast.unparse(node) for node in writing(tree))
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call) else ""
        below = "'results'" in text or "RESULTS" in text or text.startswith(("(results /", "results /"))
        if below and ".write_text(" in text:
            assert text in published, text


class TestLearning:
    @pytest.mark.parametrize(("seeds", "shown"), [((1, 1), False), ((2, 1), False), ((2, 2), True)])
    def test_an_interval_where_every_task_has_seeds_to_draw_from(self, seeds, shown, learning, tmp_path):
        module = learning.learning_dmc
        for task, count in zip(module.TASKS, seeds):
            for seed in range(count):
                reading = module.Reading(task, seed, 100_000, 100.0 * (seed + 1), 1.0, 1.0, "2026-01-01", "")
                module.record([reading], tmp_path)
        text = module.document("hardware", tmp_path)
        pooled = len(set(seeds)) == 1
        assert (f"Interquartile mean over {sum(seeds)} runs of 2 tasks: " in text) == pooled
        assert ("do not have the same number of seeds" in text) != pooled
        assert ("bootstrap interval 100 to 200" in text) == shown
        assert ("interval" in text) == shown

    def test_other_settings_have_a_section_of_their_own(self, learning, tmp_path):
        module = learning.learning_dmc
        for value, settings in ((100.0, ""), (300.0, "algorithm.horizon=0")):
            reading = module.Reading(module.TASKS[0], 0, 100_000, value, 1.0, 1.0, "2026-01-01", settings)
            module.record([reading], tmp_path)
        own, _, other = module.document("hardware", tmp_path).partition("with `algorithm.horizon=0`")
        assert "| 1 | 100 |" in own
        assert "300" not in own
        assert "| 1 | 300 |" in other
        assert "| 1 | 100 |" not in other

    def test_a_deviation_where_there_is_more_than_one_seed(self, learning):
        row = {"final_mean": -150.0, "final_std": 7.0}
        assert learning.over_seeds({**row, "seeds_done": 1}, "final") == "-150"
        assert learning.over_seeds({**row, "seeds_done": 3}, "final") == "-150 ± 7"


class TestModelQuality:
    def test_a_row_for_each_run(self, model_quality, tmp_path, monkeypatch, capsys):
        """Of an environment whose episodes end after seven steps."""
        robust = {"algorithm.name": "pwm", "algorithm.critic_passes": 8, "algorithm.critic_minibatches": 4}
        for name, changes in (("paper", {}), ("robust", robust)):
            run_with(monkeypatch, config(changes, CLOCKWORK), tmp_path / name)
        argv = ["model_quality.py", str(tmp_path / "paper"), str(tmp_path / "robust"), "--episodes", "3"]
        monkeypatch.setattr(sys, "argv", [*argv, "--horizon", "4", "--json", str(tmp_path / "rows.json")])
        model_quality.main()
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
        assert len(table) == 4
        rows = model_quality.json.loads((tmp_path / "rows.json").read_text())["rows"]
        for row in rows:
            assert row["name"] == "clockwork flow_v1 seed 0"
            assert row["terminations_real"] == pytest.approx(1 / 2)  # of the slices from 0 and from 4 the latter end
            for key in ("latent_nmse", "reward_nmse", "variance_left", "gradient_left"):
                assert len(row[key]) == 4
                assert all(math.isfinite(value) for value in row[key])

    def test_models_fitted_to_random_actions(self, model_quality, monkeypatch, capsys, tmp_path):
        words = ["--env", "pendulum", "--models", "residual", "--steps", "400", "--horizon", "4"]
        found = []
        for updates in ("1", "60"):
            argv = ["model_quality.py", *words, "--updates", updates, "--json", str(tmp_path / "rows.json")]
            monkeypatch.setattr(sys, "argv", argv)
            model_quality.main()
            found += model_quality.json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert "pendulum residual" in capsys.readouterr().out
        assert found[1]["reward_nmse"][0] < 0.5 < found[0]["reward_nmse"][0]

    def test_runs_or_an_environment(self, model_quality, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["model_quality.py"])
        with pytest.raises(SystemExit):
            model_quality.main()
