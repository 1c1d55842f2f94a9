"""The benchmarks' committed results are only written when that is asked for; what their tables say."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from stored_cases import write_store
from training_cases import CLOCKWORK, config, run_with

from pwm_torchrl.algorithm.build import Facts
from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.modules import ResidualEndpointFlow, count_parameters

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


@pytest.fixture
def flow_study(learning: ModuleType) -> ModuleType:
    """``benchmarks/flow_study.py``."""
    from benchmarks import flow_study

    return flow_study


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


class TestFlowStudy:
    FACTS = Facts(5, 1, False)

    @pytest.mark.parametrize("facts", [FACTS, Facts(17, 6, False)], ids=["1 action", "6 actions"])
    def test_kinds_have_equal_parameters(self, facts, flow_study):
        counts = {
            kind: count_parameters(flow_study.build(kind, "cheetah-run", facts, 0)[1].dynamics)
            for kind in flow_study.KINDS
        }
        for kind, count in counts.items():
            assert count == pytest.approx(counts["mlp"], rel=0.02), kind

    def test_kinds_begin_with_the_same_encoder_and_reward_head(self, flow_study):
        models = [flow_study.build(kind, "cheetah-run", self.FACTS, 3)[1] for kind in flow_study.KINDS]
        for part in ("encoder", "reward"):
            first, *others = (getattr(model, part).state_dict() for model in models)
            for other in others:
                torch.testing.assert_close(other, first, rtol=0, atol=0)

    def test_batches_and_data_depend_on_the_seed_alone(self, flow_study):
        """Flow matching draws flow times from the process-wide generator, other kinds draw nothing."""
        pytest.importorskip("dm_control")
        made = []
        for draws in (0, 7):
            torch.rand(draws)
            data = flow_study.make_data("cartpole-swingup", 1, episodes=2, held_out=2)
            batches = flow_study.Batches(data.train, 4, 5, seed=1)
            order = []
            for _ in range(3):
                torch.rand(draws)
                order.append(batches.draw().to_dict())
            made.append((data.train.to_dict(), vars(data.held_out)["observation"], order))
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)
        train, held_out, order = made[0]
        assert order[0]["action"].shape == (4, 5, 1)
        assert not torch.equal(train["observation"][:, 0], held_out[0])
        uniform, correlated = train["action"][:, :-1] * train["action"][:, 1:]
        assert correlated.mean() > 0.2 > uniform.mean().abs()

    def test_the_iterated_control_is_v2_without_flow_time(self, flow_study):
        control = flow_study.Iterated(16, 2, 0, [24, 24], 8)
        widths = [layer.out_features for layer in control.net][:-1]
        flow = ResidualEndpointFlow(16, 2, 0, widths, 8, solver="heun", substeps=4)
        with torch.no_grad():
            for ours, theirs in zip(control.net.parameters(), flow.net.parameters(), strict=True):
                ours.add_(0.3 * torch.randn_like(ours))  # it begins near the identity, which would show little
                theirs.zero_()[..., : ours.shape[-1]] = ours
        latent, action = torch.rand(3, 5, 16).unflatten(-1, (2, 8)).softmax(-1).flatten(-2), torch.rand(3, 5, 2)
        torch.testing.assert_close(control(latent, action), flow(latent, action))
        assert control.evaluations == flow.evaluations == 7

    def test_every_network_of_the_untied_control_takes_part(self, flow_study):
        control = flow_study.Untied(16, 2, 0, [24, 24], 8)
        latent = torch.rand(5, 2, 8).softmax(-1).flatten(-2)
        control(latent, torch.rand(5, 2))[..., 0].sum().backward()
        assert control.evaluations == len(control.nets) == 4
        assert all(net[-1].weight.grad.abs().sum() > 0 for net in control.nets)

    def test_finished_rows_are_not_fitted_again(self, flow_study, tmp_path, monkeypatch):
        fitted = []

        def fit(kind, task, seed, data, updates):
            fitted.append((seed, task, kind))
            return flow_study.Row(task, seed, kind, updates, 9, 0.5, 0.6, "0.1 0.9", "0.2 0.8", 1.0, 0.5, "2026-01-01")

        monkeypatch.setattr(flow_study, "fit", fit)
        monkeypatch.setattr(flow_study, "make_data", lambda task, seed: object())
        path = tmp_path / "rows.csv"
        done = fit("untied", "a", 0, None, 10)
        flow_study.record(done, path)
        for _ in range(2):
            flow_study.run_missing(["a", "b"], 2, ["residual", "untied"], 10, path)
        others = [(s, t, k) for s in range(2) for t in "ab" for k in ("residual", "untied")]
        others.remove((0, "a", "untied"))
        assert fitted == [(0, "a", "untied"), *others]
        rows = flow_study.recorded(path)
        assert rows[0] == done
        assert [(r.seed, r.task, r.kind) for r in rows] == fitted

    @pytest.mark.parametrize(
        ("ratios", "verdict"),
        [
            ((0.8, 0.82, 0.78), "helps"),
            ((0.97, 0.99, 0.98), "does not help"),
            ((1.2, 1.3, 1.25), "does not help"),
            ((0.7, 1.1, 0.9), "undecided"),
        ],
    )
    def test_readings(self, ratios, verdict, flow_study):
        """A seed without its partner does not count."""
        rows = []
        for seed, ratio in enumerate((*ratios, 5.0)):
            for kind, error in (("residual", 0.2), ("flow_v2", 0.2 * ratio)):
                if (seed, kind) != (len(ratios), "residual"):
                    rows.append(flow_study.Row("a", seed, kind, 10, 9, error, 0.6, "1 2", "1 2", 1.0, 0.5, ""))
        found = flow_study.change(rows, "flow_v2", "residual", ["a"])
        assert found.by_seed == pytest.approx([ratio - 1 for ratio in ratios])
        assert found.low < found.value < found.high
        assert found.verdict == verdict
        assert flow_study.change(rows, "flow_v2", "residual", ["a", "b"]) is None

    def test_a_fit_is_measured_on_held_out_episodes(self, flow_study):
        pytest.importorskip("dm_control")
        data = flow_study.make_data("cartpole-swingup", 0, episodes=4, held_out=2)
        row = flow_study.fit("flow_v1_fm", "cartpole-swingup", 0, data, updates=20)
        steps = [float(e) for e in row.reward_steps.split()]
        assert len(steps) == len(row.latent_steps.split()) == 16
        assert row.reward_error == pytest.approx(sum(steps) / 16, rel=1e-3)
        assert row.reward_error < row.reward_halfway


class TestMultitask:
    @pytest.fixture
    def study(self, learning: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """A store of two tasks, and what two policies of the first returned."""
        monkeypatch.syspath_prepend(BENCHMARKS)
        from benchmarks import multitask

        made = multitask.Study(tmp_path, ("cup-catch", "finger-spin"), ("residual",), 100, 2, [], False, 1)
        store = write_store(made.store, ("cup-catch", "finger-spin"), 10)
        returns = EpisodeStore.open(store).returns()
        monkeypatch.setattr(EpisodeStore, "returns", lambda self, rows: (100 * np.arange(20.0))[rows])
        assert len(returns) == 20  # of which every second is of cup-catch: 0, 200, ... 1800
        for seed, value in enumerate((1400.0, 1600.0)):
            run = made.policy("residual", "cup-catch", seed)
            run.mkdir(parents=True)
            (run / "summary.json").write_text('{"status": "finished"}')
            (run / "final_returns.json").write_text(json.dumps([value] * 20))
        return multitask, made

    def test_policies_beside_the_mean_and_the_best_tenth_of_the_data(self, study) -> None:
        row = study[1].rows()[0]
        assert (row["data"], row["best"]) == (900, 1800)
        assert row["seeds"] == [1400, 1600]
        assert row["mean"] == 1500
        assert 1400 < row["low"] < 1500 < row["high"] < 1600
        assert row["above_data"]
        assert row["near_best"]  # 1500 of 1440

    def test_a_table_with_missing_runs_says_so(self, study) -> None:
        multitask, made = study
        text = multitask.markdown("COMMAND", made.rows(), "Title", 100, 2)
        assert "# Title (partial)" in text
        assert "| finger-spin | residual | not run |" in text

    def test_a_task_without_good_data_does_not_count(self, study) -> None:
        multitask, made = study
        rows = [{**made.rows()[0], "best": 499.0}]
        assert "does not count" in multitask.markdown("COMMAND", rows, "Title", 100, 2)
        assert "(partial)" not in multitask.markdown("COMMAND", rows, "Title", 100, 2)


class TestEnvironments:
    """``benchmarks/environments.py``."""

    def test_a_line_in_a_process_of_its_own(self, learning):
        from benchmarks import environments

        found = environments.measured("pendulum_torchrl", 2, 0.1)
        assert found["action_repeat"] == 1
        assert min(found["plain"]) > 0
        assert min(found["gradients"]) > 0

    def test_what_cannot_be_measured_is_named_with_its_reason(self, learning):
        from benchmarks import environments

        rows = [("pendulum", 4, {"plain": [0.5, 0.5, 1.0], "action_repeat": 2}), ("brax", 1, {"error": "needs jax"})]
        text = environments.document(rows, "a machine")
        assert "| pendulum | 4 | 8 (\u00b1 50%) |  | 2 |" in text
        assert "- brax: needs jax" in text
