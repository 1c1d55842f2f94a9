"""Returns and TD(λ) targets against written-out loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pwm_torchrl.objectives import ensemble_value_loss, rollout_return, td_lambda_targets
from pwm_torchrl.objectives.imagination import alive_before

GAMMA, LMBDA = 0.9, 0.8


def rollout(horizon: int, batch: int = 4, ends: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(horizon, batch, 1, generator=g, dtype=torch.float64)
    value = torch.randn(horizon, batch, 1, generator=g, dtype=torch.float64)
    return reward, value, torch.rand(horizon, batch, 1, generator=g) < ends


class TestRolloutReturn:
    @given(horizon=st.integers(1, 8), ends=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 999))
    def test_against_a_loop(self, horizon: int, ends: float, seed: int) -> None:
        reward, value, terminated = rollout(horizon, ends=ends, seed=seed)
        actual = rollout_return(reward, terminated, value[-1], GAMMA)
        for b in range(4):
            expected, alive = 0.0, True
            for t in range(horizon):
                if alive:
                    expected += GAMMA**t * reward[t, b, 0].item()
                    alive = not terminated[t, b, 0]
            expected += GAMMA**horizon * value[-1, b, 0].item() * alive
            assert actual[b, 0].item() == pytest.approx(expected)

    def test_alive_before(self) -> None:
        terminated = torch.tensor([[False], [True], [False], [True]]).unsqueeze(-1)
        assert alive_before(terminated).flatten().tolist() == [1, 1, 0, 0, 0]

    @pytest.mark.parametrize(
        ("reward", "terminated", "value"),
        [
            ((5, 4), (5, 4), (4,)),
            ((5, 4, 1), (5, 4), (4, 1)),
            ((5, 4, 1), (5, 4, 1), (4,)),
            ((5, 4, 1), (5, 1, 1), (4, 1)),
            ((5, 4, 1), (5, 4, 1), (1, 1)),
            ((5, 4, 2), (5, 4, 2), (4, 2)),
        ],
    )
    def test_refuses_to_broadcast(self, reward: tuple, terminated: tuple, value: tuple) -> None:
        with pytest.raises(ValueError, match=r"nothing is broadcast"):
            rollout_return(torch.zeros(reward), torch.zeros(terminated, dtype=torch.bool), torch.zeros(value), GAMMA)

    def test_gradcheck(self) -> None:
        reward, value, terminated = rollout(4, ends=0.2)
        inputs = (reward.requires_grad_(), value[-1].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda r, v: rollout_return(r, terminated, v, GAMMA), inputs)


class TestTargets:
    def expected(self, reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """G_t = r_t + γ (1 − terminated_t) [(1 − λ) V_{t+1} + λ G_{t+1}]; G_{t+1} = V_{t+1} where done, and last."""
        targets, last = [], value[-1]
        for r, v, end, stop in zip(*(x.flip(0) for x in (reward, value, terminated, done)), strict=True):
            last = torch.where(stop, v, last)
            last = r + GAMMA * (~end).double() * ((1 - LMBDA) * v + LMBDA * last)
            targets.append(last)
        return torch.stack(targets[::-1])

    @given(horizon=st.integers(1, 8), ends=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 999))
    def test_against_a_loop(self, horizon: int, ends: float, seed: int) -> None:
        reward, value, terminated = rollout(horizon, ends=ends, seed=seed)
        actual = td_lambda_targets(reward, value, terminated, GAMMA, LMBDA)
        torch.testing.assert_close(actual, self.expected(reward, value, terminated, terminated))

    @given(seed=st.integers(0, 999))
    def test_truncation_bootstraps_and_stops(self, seed: int) -> None:
        reward, value, done = rollout(6, ends=0.3, seed=seed)
        terminated = done & (torch.rand(done.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
        actual = td_lambda_targets(reward, value, terminated, GAMMA, LMBDA, done=done)
        torch.testing.assert_close(actual, self.expected(reward, value, terminated, done))

    def test_end_points_of_lambda(self) -> None:
        reward, value, terminated = rollout(6)
        one_step = reward + GAMMA * value
        torch.testing.assert_close(td_lambda_targets(reward, value, terminated, GAMMA, 0.0), one_step)
        monte_carlo = td_lambda_targets(reward, value, terminated, GAMMA, 1.0)
        torch.testing.assert_close(monte_carlo[0], rollout_return(reward, terminated, value[-1], GAMMA))

    def test_carry_no_gradient(self) -> None:
        reward, value, terminated = rollout(6)
        assert not td_lambda_targets(
            reward.requires_grad_(), value.requires_grad_(), terminated, GAMMA, LMBDA
        ).requires_grad

    @pytest.mark.parametrize(
        ("reward", "value", "terminated"),
        [
            ((5, 4), (5, 4), (5, 4)),
            ((5, 4, 1), (5, 4), (5, 4, 1)),
            ((5, 4, 1), (5, 1, 1), (5, 4, 1)),
            ((5, 4, 1), (5, 4, 1), (5, 4)),
        ],
    )
    def test_refuse_to_broadcast(self, reward: tuple, value: tuple, terminated: tuple) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            td_lambda_targets(
                torch.zeros(reward), torch.zeros(value), torch.zeros(terminated, dtype=torch.bool), GAMMA, LMBDA
            )


class TestEnsembleValueLoss:
    def test_elementwise(self) -> None:
        values, target = torch.randn(3, 5, 4, 1), torch.randn(5, 4, 1)
        loss = ensemble_value_loss(values, target)
        assert loss.shape == (3, 5, 4, 1)
        torch.testing.assert_close(loss[1, 2, 3], (values[1, 2, 3] - target[2, 3]) ** 2)

    @pytest.mark.parametrize("target", [(5,), (1,), (5, 5), (1, 1), (3, 5, 1), (4, 1)])
    def test_refuses_to_broadcast(self, target: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            ensemble_value_loss(torch.zeros(3, 5, 1), torch.zeros(target))

    def test_flat_batch_of_one(self) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            ensemble_value_loss(torch.zeros(3, 1, 1), torch.zeros(1))

    def test_gradcheck(self) -> None:
        values, target = torch.randn(3, 4, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda v: ensemble_value_loss(v, target), values.requires_grad_())
        assert not ensemble_value_loss(values.detach(), target.requires_grad_()).requires_grad
