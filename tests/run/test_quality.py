"""What a run says of networks that do not learn: failing and healthy ones, once in a run, without changing it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.config import Config
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives.model_loss import Slices
from pwm_torchrl.objectives.soft_actor_loss import squashed_log_prob
from pwm_torchrl.run import quality as quality_module
from pwm_torchrl.run.quality import (
    Quality,
    effective_rank,
    latent_variance,
    not_compiled,
    rollout_errors,
    saturated_share,
    start_dependence,
    termination_shares,
    value_quality,
    within_tasks,
)

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


# The measures, against values that were worked out by hand ------------------------------------------------------------


class Linear(nn.Module):
    """z' = scale · z + a + bias and r = Σ z + bias on observations as latents; terminates with probability ``p``."""

    reward = SimpleNamespace(decode=lambda logits: logits)

    def __init__(self, scale: float = 0.5, bias: float = 0.0, p: float = 0.0) -> None:
        super().__init__()
        self.scale, self.bias, self.p = scale, bias, p

    def encode(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        return observation.clone()

    def predict(self, z: Tensor, a: Tensor, task: Tensor | None = None, imagined: bool = False) -> Any:
        return self.scale * z + a + self.bias, z.sum(-1, keepdim=True) + self.bias, None

    def soft_step(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        following, reward, _ = self.predict(z, a)
        return following, reward, torch.full_like(reward, self.p)

    def forward(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        following, reward, p = self.soft_step(z, a)
        return following, reward, p >= 0.5


def flags(*rows: tuple[int, ...]) -> Tensor:
    """Booleans ``[H, B, 1]`` of a row per step."""
    return torch.tensor(rows, dtype=torch.bool).unsqueeze(-1)


class TestLatents:
    def test_variance_is_a_mean_over_features(self) -> None:
        assert latent_variance(torch.tensor([[0.0, 3.0], [2.0, 3.0]])) == 0.5

    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_directions_of_equal_size_count_in_full(self, rank: int) -> None:
        latent = torch.cat([torch.eye(rank, 8), -torch.eye(rank, 8)])
        assert effective_rank(latent + 3).item() == pytest.approx(rank, rel=1e-5)

    def test_unequal_directions(self) -> None:
        latent = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert effective_rank(latent).item() == pytest.approx(math.exp(entropy), rel=1e-5)

    def test_latents_that_are_all_the_same_have_none(self) -> None:
        assert effective_rank(torch.rand(1, 8).expand(20, 8)) == 0

    def test_what_tells_tasks_apart_does_not_count(self) -> None:
        task = torch.tensor([0, 3, 0, 3, 3])
        same = torch.nn.functional.one_hot(task, 8).float()
        assert latent_variance(same) > 0.01
        assert latent_variance(within_tasks(same, task)) == 0
        assert latent_variance(within_tasks(torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([1, 0, 1]))) == 2 / 3


class TestRolloutErrors:
    def test_of_a_biased_model_up_to_where_episodes_end(self) -> None:
        """The latent is off by b Σ 0.5^i, the reward by b and the latent before; nothing is fed back."""
        torch.manual_seed(0)
        true, biased = Linear(), Linear(bias=0.1)
        observation, action = torch.randn(3, 2), torch.randn(4, 3, 2)
        following, rewards, z = [], [], observation
        for a in action:
            z, r, _ = true.predict(z, a)
            following.append(z)
            rewards.append(r)
        valid = flags((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0))
        spoiled = torch.where(valid, torch.stack(following), 1e6)
        latent, reward = rollout_errors(biased, observation, action, spoiled, torch.stack(rewards), valid=valid)
        off = [0.1 * sum(0.5**i for i in range(t + 1)) for t in range(3)]
        assert latent[:3].tolist() == pytest.approx([x**2 for x in off], rel=1e-4)
        assert reward[:3].tolist() == pytest.approx([(0.1 + 2 * x) ** 2 for x in (0, *off[:2])], rel=1e-4)
        assert latent[3].isnan()
        assert reward[3].isnan()

    def test_without_compiled_code_which_is_there_again_afterwards(self) -> None:
        model = make_world_model(WorldModelSpec(3, 1, 16, [16], [16]))
        model.compile_pieces()
        piece = model.dynamics.piece
        rollout_errors(model, torch.rand(5, 3), torch.rand(2, 5, 1), torch.rand(2, 5, 3), torch.rand(2, 5, 1))
        assert piece is not None
        assert piece._compiled is None
        assert model.dynamics.piece is piece
        with not_compiled(model):
            assert model.dynamics.piece is None
        assert model.dynamics.piece is piece


class TestTerminations:
    def slices(self, terminated: Tensor, valid: Tensor) -> Slices:
        steps, batch = valid.shape[:2]
        return Slices(
            torch.zeros(batch, 2),
            torch.zeros(steps, batch, 2),
            torch.zeros(steps, batch, 2),
            torch.zeros(steps, batch, 1),
            terminated,
            valid,
        )

    def test_of_probabilities(self) -> None:
        """Three, one and three steps with 0.2 each; the second really ends, the third is only said to after its end."""
        slices = self.slices(flags((0, 1, 0), (0, 1, 0), (0, 0, 0)), flags((1, 1, 1), (1, 0, 1), (1, 0, 1)))
        predicted, real = termination_shares(Linear(p=0.2), slices)
        assert predicted.item() == pytest.approx((2 * (1 - 0.8**3) + 0.2) / 3, rel=1e-5)
        assert real.item() == pytest.approx(1 / 3)

    @pytest.mark.parametrize(("p", "expected"), [(0.4, 0.0), (0.6, 1.0)])
    def test_of_a_threshold(self, p: float, expected: float) -> None:
        slices = self.slices(flags((0, 0), (0, 0)), flags((1, 1), (1, 1)))
        assert termination_shares(Linear(p=p), slices, soft=False)[0] == expected

    def test_a_model_without_a_head_predicts_none(self) -> None:
        model = make_world_model(WorldModelSpec(2, 2, 16, [16], [16]))
        predicted, real = termination_shares(model, self.slices(flags((1, 0)), flags((1, 1))))
        assert (predicted, real) == (0.0, 0.5)


class TestStartLeft:
    def test_of_a_linear_map(self) -> None:
        torch.manual_seed(0)
        left = start_dependence(Linear(scale=0.5), torch.randn(20, 4), torch.randn(3, 4))
        assert left.variance.tolist() == pytest.approx([0.25, 0.25**2, 0.25**3], rel=1e-4)
        assert left.gradient.tolist() == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)

    def test_draws_nothing_and_leaves_no_gradient(self) -> None:
        model = make_world_model(WorldModelSpec(3, 2, 16, [16], [16]))
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        start_dependence(model, torch.zeros(4, 3), torch.zeros(2, 2))
        assert torch.rand(1) == expected
        assert all(p.grad is None for p in model.parameters())


def test_saturated_actions_count_while_their_episode_lasts() -> None:
    action = torch.tensor([[[1.0, -0.99], [0.5, 0.0]], [[0.96, -0.98], [1.0, 1.0]]])
    assert saturated_share(action, flags((1, 1), (1, 0))).item() == pytest.approx(3 / 6)


class FixedCritic(nn.Module):
    """Values of states: the observation's first feature."""

    action_dim, scale = 0, None

    def value(self, latent: Tensor, action: Tensor | None = None) -> Tensor:
        return latent[..., :1]


class Gaussian(nn.Module):
    """A policy that is the same everywhere."""

    def __init__(self, temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = None if temperature is None else torch.tensor(temperature)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(latent[..., :1]), torch.full_like(latent[..., :1], 0.3)

    def act(self, latent: Tensor) -> Tensor:
        return torch.zeros_like(latent[..., :1])


class TestValues:
    GAMMA = 0.5

    def measured(self, value: list[list[float]], **changes: Any) -> Any:
        """Two episodes of rewards 1, 2, 3, 4: one is cut off, one terminates after its second step.

        ``value`` are those of the five states of each.
        """
        state = torch.tensor(value).transpose(0, 1).unsqueeze(-1)
        reward = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1).expand(4, 2, 1)
        actor = Gaussian(changes.pop("temperature", None))
        return value_quality(
            Networks(actor=actor, critic=FixedCritic()),  # type: ignore[arg-type]
            observation=state[:-1],
            action=torch.zeros(4, 2, 1),
            next_observation=state[1:],
            reward=reward * changes.pop("size", 1.0),
            valid=flags((1, 1), (1, 1), (1, 0), (1, 0)),
            terminated=flags((0, 0), (0, 1), (0, 0), (0, 0)),
            gamma=self.GAMMA,
        )

    def test_returns_of_episodes_that_are_cut_off_and_that_end(self) -> None:
        """Cut off with the value 8 of its last state: 1 + (2 + (3 + (4 + 8/2)/2)/2)/2; ended: 1 + 2/2."""
        cut = [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 8)), 2 + 0.5 * (3 + 0.5 * 8)]
        found = self.measured([[*cut, 9e9, 9e9, 8.0], [2.0, 9e9, 9e9, 9e9, 9e9]])
        assert found.realised.item() == pytest.approx((sum(cut) + 2.0) / 3)
        assert found.predicted.item() == pytest.approx(found.realised.item())
        assert found.error == 0

    def test_error_in_sizes_of_the_returns(self) -> None:
        cut = [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 8)), 2 + 0.5 * (3 + 0.5 * 8)]
        found = self.measured([[3 * cut[0], 3 * cut[1], 0.0, 0.0, 8.0], [6.0, 0.0, 0.0, 0.0, 0.0]])
        assert found.error.item() == pytest.approx(2.0)

    def test_without_rewards_an_error_counts_in_units(self) -> None:
        found = self.measured([[7.0, 7.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0, 0.0]], size=0.0)
        assert (found.realised, found.error) == (0.0, 7.0)

    def test_entropies_count_where_the_policy_has_a_temperature(self) -> None:
        noise = torch.randn((4, 2, 1), generator=torch.Generator().manual_seed(0))
        std = torch.full_like(noise, 0.3)
        bonus = (-0.2 * squashed_log_prob(noise * std, std, noise)).squeeze(-1)[:, 0].tolist()
        ends = 4 + 0.5 * (bonus[3] + 8.0)
        second = 2 + 0.5 * (bonus[1] + 3 + 0.5 * (bonus[2] + ends))
        first = 1 + 0.5 * (bonus[0] + second)
        other = 1 + 0.5 * ((-0.2 * squashed_log_prob(noise * std, std, noise))[0, 1, 0].item() + 2)
        found = self.measured([[0.0, 0.0, 0.0, 0.0, 8.0], [0.0] * 5], temperature=0.2)
        assert found.realised.item() == pytest.approx((first + second + other) / 3, rel=1e-5)
