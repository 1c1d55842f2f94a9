"""What a run says of networks that do not learn: failing and healthy ones, once in a run, without changing it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import (
    CLOCKWORK,
    Bench,
    assert_equal,
    config,
    rows_of,
    run_with,
    stop_after,
    trajectories,
    weights_of,
)

from pwm_torchrl.algorithm.base import MetricRow
from pwm_torchrl.config import Config
from pwm_torchrl.run import quality as quality_module
from pwm_torchrl.run.quality import Quality, rollout_errors, saturated_share, value_quality

MODEL = {"model/latent_variance", "model/latent_rank", "model/latent_nmse", "model/reward_nmse"}
TERMINATIONS = {"model/terminations_predicted", "model/terminations_real"}


@pytest.fixture(autouse=True)
def updates_do_not_count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a few updates are judged here, but where a test says otherwise."""
    if "least_updates" not in request.fixturenames:
        monkeypatch.setattr(quality_module, "MIN_UPDATES", 0)


@pytest.fixture
def least_updates() -> int:
    """The real limit."""
    return quality_module.MIN_UPDATES


class Measured:
    """Networks over stored data, and what is said of them."""

    def __init__(
        self, run_dir: Path, changes: dict[str, Any] | None = None, terminates: bool = False, ends: int = 0
    ) -> None:
        self.data = trajectories(envs=4, steps=40)
        self.data["next", "reward"] = self.data["action"] + 0.5
        if ends:  # one step in so many ends an episode
            self.data["next", "terminated"][:, ::ends] = self.data["next", "done"][:, ::ends] = True
        self.cfg = config(changes)
        self.bench = Bench(self.cfg, self.data, terminates)
        self.networks = self.bench.networks
        self.bench.algorithm.started = True
        self.run_dir = run_dir
        self.quality = Quality(self.cfg, self.bench.algorithm, run_dir)

    def model(self) -> dict[str, float]:
        row = MetricRow()
        self.quality.measure_model(self.data[:, :10], row)
        return row.numbers()

    def said(self, numbers: dict[str, float]) -> dict[str, str]:
        """Causes and sentences, after two measurements of these numbers."""
        (self.run_dir / "events.jsonl").unlink(missing_ok=True)
        quality = Quality(self.cfg, self.bench.algorithm, self.run_dir)
        quality.judge(1, numbers)
        assert not self.events()
        quality.judge(2, numbers)
        return {event["cause"]: event["warning"] for event in self.events()}

    def events(self) -> list[dict[str, Any]]:
        return events(self.run_dir)


def events(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "quality"]


class TestModel:
    def test_what_is_measured(self, tmp_path: Path) -> None:
        found = Measured(tmp_path).model()
        assert set(found) == MODEL
        assert 0 < found["model/latent_variance"] < 7 / 64
        assert 1 < found["model/latent_rank"] <= 16
        assert all(math.isfinite(value) for value in found.values())

    def test_errors_are_those_of_the_batch_over_the_variance_of_what_is_stored(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        found, loss = made.model(), made.bench.losses.model
        slices = loss.read(torch.cat([made.data[:, :4], made.data[:, 4:8]]))
        errors = rollout_errors(
            made.networks.model, slices.observation, slices.action, slices.next_observation, slices.reward
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            stored = loss.read(made.bench.algorithm.sample_slices(256))
        variance = stored.reward.var(unbiased=False)
        assert found["model/reward_nmse"] == pytest.approx((errors[1].mean() / variance).item(), rel=1e-5)
        expected = (errors[0].mean() / found["model/latent_variance"]).item()
        assert found["model/latent_nmse"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "changes", [{}, {"model.reward_head": "two_hot"}, {"algorithm.normalize_observations": True}]
    )
    def test_changes_neither_random_numbers_nor_networks(self, changes: dict[str, Any], tmp_path: Path) -> None:
        made = Measured(tmp_path, changes, terminates=True, ends=5)
        before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in made.networks.items()}
        state = torch.get_rng_state()
        made.model()
        assert torch.equal(torch.get_rng_state(), state)
        for name, network in made.networks.items():
            assert_equal(dict(network.state_dict()), before[name])

    def test_a_batch_shorter_than_a_slice(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        row = MetricRow()
        made.quality.measure_model(made.data[:, :2], row)
        assert set(row.numbers()) == MODEL

    def test_only_what_was_stored_where_nothing_is_collected(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        row = MetricRow()
        made.quality.measure_model(made.data.empty(), row)
        assert set(row.numbers()) == {"model/latent_variance", "model/latent_rank"}

    def test_nothing_of_a_model_that_is_not_trained(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        made.bench.algorithm.started = False
        assert made.model() == {}
        made.bench.algorithm.started = True
        del made.bench.algorithm.optimizers["model"]
        assert made.model() == {}

    def test_nothing_of_a_model_that_has_diverged(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        with torch.no_grad():
            made.networks.model.encoder.net[0].weight.fill_(math.nan)
        assert made.model() == {}


class TestSentences:
    def test_latents(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        assert "latents" not in made.said(made.model())
        with torch.no_grad():
            made.networks.model.encoder.net[-1].ln.weight.zero_()
        found = made.model()
        assert found["model/latent_variance"] < 1e-12
        assert found["model/latent_rank"] == 0
        sentence = made.said(found)["latents"]
        assert "have collapsed" in sentence
        assert "model.loss.dynamics_coef (1)" in sentence

    def test_rewards(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        before = made.model()
        assert before["model/reward_nmse"] > 1  # the head begins at 0, which is worse than the mean
        assert "algorithm.model_updates (2)" in made.said(before)["rewards"]
        for _ in range(150):
            made.bench.algorithm.update_model(MetricRow())
        assert made.model()["model/reward_nmse"] < 0.8
        assert "rewards" not in made.said(made.model())

    @pytest.mark.parametrize(
        ("logit", "causes"), [(-9.0, {"endless"}), (math.log(0.2 / 0.8), set()), (9.0, {"too_early"})]
    )
    def test_terminations(self, logit: float, causes: set[str], tmp_path: Path) -> None:
        """Of slices of four steps, most end; or none do, where the model says that all do."""
        made = Measured(tmp_path, {"algorithm.name": "pwm"}, terminates=True, ends=0 if logit > 0 else 5)
        head = made.networks.model.termination
        with torch.no_grad():
            head.net[-1].weight.zero_()
            head.net[-1].bias.fill_(logit)
        found = made.model()
        assert set(found) == MODEL | TERMINATIONS
        said = made.said(found)
        assert set(said) & {"endless", "too_early"} == causes
        assert all("model.loss.termination_coef (1)" in said[cause] for cause in causes)

    def test_terminations_below_the_threshold_of_the_published_algorithm(self, tmp_path: Path) -> None:
        made = Measured(tmp_path, terminates=True, ends=5)
        with torch.no_grad():
            made.networks.model.termination.net[-1].weight.zero_()
            made.networks.model.termination.net[-1].bias.fill_(math.log(0.2 / 0.8))
        found = made.model()
        assert found["model/terminations_predicted"] == 0
        assert "choose algorithm=pwm" in made.said(found)["endless"]

    def test_terminations_without_a_head(self, tmp_path: Path) -> None:
        made = Measured(tmp_path, ends=5)
        assert "set model.termination_head=true" in made.said(made.model())["endless"]

    @pytest.mark.parametrize(
        ("name", "key"), [("pwm", "algorithm.target_entropy (-1)"), ("pwm_paper", "algorithm.entropy_weight (0)")]
    )
    def test_actions(self, name: str, key: str, tmp_path: Path) -> None:
        made = Measured(tmp_path, {"algorithm.name": name})
        latent = made.networks.model.encode(made.data["observation"])
        valid = torch.ones(*latent.shape[:-1], 1, dtype=torch.bool)

        def numbers() -> dict[str, float]:
            return {"policy/mean_saturated": saturated_share(made.networks.actor.act(latent), valid).item()}

        assert made.said(numbers()) == {}
        with torch.no_grad():
            made.networks.actor.net[-1].bias.fill_(9.0)
        sentence = made.said(numbers())["actions"]
        assert "100% of its actions" in sentence
        assert key in sentence

    def test_values(self, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        reward = torch.ones(40, 4, 1)

        def numbers(size: float) -> dict[str, float]:
            with torch.no_grad():
                made.networks.critic.params[-2].zero_()
                made.networks.critic.params[-1].fill_(size)
            observation = made.data["observation"].transpose(0, 1)
            never = torch.zeros(40, 4, 1, dtype=torch.bool)
            found = value_quality(
                made.networks, observation, torch.zeros(40, 4, 1), observation, reward, ~never, never, 0.9
            )
            return {
                "eval/value": found.predicted.item(),
                "eval/value_return": found.realised.item(),
                "eval/value_error": found.error.item(),
            }

        healthy = numbers(10.0)  # 1 / (1 - 0.9)
        assert healthy["eval/value_error"] < 1e-5
        assert made.said(healthy) == {}
        sentence = made.said(numbers(100.0))["values"]
        assert "predict 100 on average" in sentence
        assert "algorithm.critic_lr (0.0005)" in sentence
        assert made.said(numbers(-20.0)) == {}  # too low by three times the returns, as values of a fast learner are
        assert "predict -100 on average" in made.said(numbers(-100.0))["values"]

    def test_nothing_before_the_networks_had_time_to_learn(self, least_updates: int, tmp_path: Path) -> None:
        made = Measured(tmp_path)
        wrong = {"model/reward_nmse": 2.0}
        for _ in range(least_updates - 1):
            made.bench.algorithm.update_model(MetricRow())
        assert made.said(wrong) == {}
        made.bench.algorithm.update_model(MetricRow())
        assert set(made.said(wrong)) == {"rewards"}

    def test_every_key_exists(self, tmp_path: Path) -> None:
        """And the number behind it is its value."""
        wrong = {
            "model/latent_variance": 0.0,
            "model/reward_nmse": 2.0,
            "policy/mean_saturated": 1.0,
            "eval/value": 9.0,
            "eval/value_return": 1.0,
            "eval/value_error": 9.0,
        }
        found = []
        for name in ("pwm", "pwm_paper"):
            for ends in ((0.0, 1.0), (1.0, 0.0)):
                made = Measured(tmp_path, {"algorithm.name": name}, terminates=True)
                made.quality.shown = ["latents", "rewards", "endless", "too_early", "actions", "values"]
                terminations = dict(zip(("model/terminations_predicted", "model/terminations_real"), ends))
                made.quality.judge(1, {**wrong, **terminations})
                found += [(made.cfg, event["warning"]) for event in made.events()]
                (tmp_path / "events.jsonl").unlink()
        assert len(found) == 20
        for cfg, sentence in found:
            keys = re.findall(r"((?:algorithm|model)\.[\w.]+\w)(?: \((\S+)\))?", sentence)
            assert keys, sentence
            for key, value in keys:
                assert_key(cfg, key, value)


def assert_key(cfg: Config, key: str, value: str) -> None:
    at: Any = cfg
    for part in key.split("."):
        assert hasattr(at, part), key
        at = getattr(at, part)
    # model.loss.*_coef=None is the form's own, which is 1 here
    assert not value or float(value) == pytest.approx(1.0 if at is None else at), key


class TestRuns:
    EVERY = {"training.epochs": 6, "training.eval_every": 1, "training.checkpoint_every": 1}  # noqa: RUF012

    def test_a_measurement_with_each_evaluation_once_it_is_trained(self, tmp_path, monkeypatch):
        cfg = config({"training.epochs": 5, "training.eval_every": 2, "algorithm.random_steps": 16})
        run_with(monkeypatch, cfg, tmp_path)
        rows = rows_of(tmp_path)
        assert [int(row["epoch"]) for row in rows if row["model/reward_nmse"]] == [4, 5]
        assert [int(row["epoch"]) for row in rows if row["eval/value_error"]] == [2, 4, 5]
        assert [int(row["epoch"]) for row in rows if row["policy/mean_saturated"]] == [2, 4, 5]

    def test_terminations_of_an_environment_that_terminates(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config({"training.epochs": 4}, CLOCKWORK), tmp_path)
        assert float(rows_of(tmp_path)[-1]["model/terminations_real"]) > 0

    def test_training_is_the_same_without_it(self, tmp_path, monkeypatch):
        _, measured = run_with(monkeypatch, config(self.EVERY), tmp_path / "measured")
        with monkeypatch.context() as patch:
            patch.setattr(Quality, "measure_model", lambda self, batch, row: None)
            _, plain = run_with(patch, config(self.EVERY), tmp_path / "plain")
        assert_equal(weights_of(measured), weights_of(plain))
        rows = [{k: v for k, v in row.items() if k not in MODEL} for row in rows_of(tmp_path / "measured")]
        assert rows == rows_of(tmp_path / "plain")

    @pytest.mark.parametrize("stops", [(), (2,), (3, 5)], ids=["straight", "before", "after"])
    def test_warns_once_in_a_run_however_often_it_is_resumed(self, stops, tmp_path, monkeypatch, capsys):
        """The first measurement is in the second epoch; the third confirms it."""
        monkeypatch.setattr(quality_module, "MIN_LATENT_VARIANCE", 1e9)
        for i, epoch in enumerate(stops):
            run_with(monkeypatch, config(self.EVERY), tmp_path, resume=i > 0, after_epoch=stop_after(epoch))
        run_with(monkeypatch, config(self.EVERY), tmp_path, resume=bool(stops))
        (event,) = [event for event in events(tmp_path) if event["cause"] == "latents"]
        assert event["epoch"] == 3
        assert capsys.readouterr().err.count("the latents have collapsed") == 1

    def test_checkpoints_of_earlier_versions_have_nothing_of_it(self, tmp_path, monkeypatch):
        cfg = config(self.EVERY)
        _, run = run_with(monkeypatch, cfg, tmp_path)
        state = run.loop.state_dict()
        run.loop.quality.told = ["latents"]
        del state["quality"]
        run.loop.load_state_dict(state)
        assert run.loop.quality.told == []
