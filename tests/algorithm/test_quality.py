"""What networks are worth, against values that were worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives.model_loss import Slices
from pwm_torchrl.objectives.soft_actor_loss import squashed_log_prob
from pwm_torchrl.run.quality import (
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
