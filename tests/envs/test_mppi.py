"""Planning with a policy's proposals and a terminal value, in models whose best actions are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from pwm_torchrl.errors import DivergenceError
from pwm_torchrl.modules import (
    Actor,
    actor_module,
)

from .mppi_cases import (
    BEST_POLICY,
    BEST_VALUE,
    GAMMA,
    STATES,
    ZERO,
    D,
    K,
    Model,
    linear,
    module,
    never,
    planner,
    seen,
    state,
)


class TestWhatItFinds:
    @pytest.mark.parametrize("horizon", [1, 3])
    def test_the_best_actions_of_a_linear_quadratic_model(self, horizon: int) -> None:
        """With the best value at its end, a plan of any length begins with the best action."""
        plan = planner(value=BEST_VALUE, planning_horizon=horizon, temperature=20.0, min_std=0.01, num_candidates=256)
        torch.testing.assert_close(plan(STATES.clone())["action"], -STATES["latent"] @ K.T, atol=0.03, rtol=0)

    def test_a_long_horizon_needs_no_value(self) -> None:
        plan = planner(
            planning_horizon=12, temperature=5.0, min_std=0.01, num_candidates=1024, top_k=32, optim_steps=12
        )
        torch.testing.assert_close(plan(STATES.clone())["action"], -STATES["latent"] @ K.T, atol=0.1, rtol=0)

    def test_one_step_without_reward_maximises_the_value(self) -> None:
        def move(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return torch.cat([a, z[..., 1:]], -1), 0 * a, never(z), never(z)

        near = module(lambda z: -(z[..., :1] - 0.3).square(), "state_value")
        action = planner(Model(move), value=near, planning_horizon=1, temperature=50.0, min_std=0.01)(STATES.clone())
        torch.testing.assert_close(action["action"], torch.full((3, 1), 0.3), atol=0.02, rtol=0)

    def test_actions_have_the_range_of_the_environment(self) -> None:
        """The best action, 5, lies in the upper half of [2, 6], of which the search knows only fractions."""

        def move(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            assert ((a >= 2) & (a <= 6)).all()
            return z, -(a - 5).square(), never(z), never(z)

        policy = module(lambda z: 0 * z[..., :1] + 3, "action")
        action = planner(Model(move, 2.0, 6.0), policy, temperature=20.0, min_std=0.01)(STATES.clone())["action"]
        torch.testing.assert_close(action, torch.full((3, 1), 5.0), atol=0.05, rtol=0)

    def test_in_closed_loop_it_beats_the_policy_that_it_starts_from(self) -> None:
        def cost(act: Any) -> Tensor:
            torch.manual_seed(0)
            env = Model(batch=())
            start = TensorDict(latent=torch.tensor([0.9, 0.5]), batch_size=[])
            return env.rollout(20, act, tensordict=start, auto_reset=False)["next", "reward"].sum()

        lazy, planned, best = cost(ZERO), cost(planner(value=BEST_VALUE, temperature=5.0)), cost(BEST_POLICY)
        assert lazy < planned <= best + 1e-3
        assert best - planned < 0.05 * (best - lazy)


class TestCandidates:
    def test_the_policys_are_among_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = planner(policy=BEST_POLICY, num_policy_candidates=3)
        rounds = seen(plan, monkeypatch)
        plan(STATES.clone())
        z, expected = STATES["latent"], []
        for _ in range(3):
            expected.append(-z @ K.T)
            z = linear(z, expected[-1])[0]
        assert [len(rounds), rounds[0].shape] == [6, (3, 128, 3, 1)]
        for candidates in rounds:
            for seeded in candidates[:, :3].unbind(1):
                torch.testing.assert_close(seeded, torch.stack(expected, 1))
        assert rounds[0][:, 3:].std() > 0.5

    def test_the_first_is_the_policys_mode_and_the_others_are_drawn(self) -> None:
        actor = Actor(D, 1, [16])
        plan = planner(policy=actor_module(actor), num_policy_candidates=64)
        proposed = plan.policy_candidates(STATES)
        torch.testing.assert_close(proposed[:, 0, 0], actor.act(STATES["latent"]).detach())
        spread = proposed[:, 1:, 0].std(1)
        assert (spread > 0.01).all()
        assert not torch.equal(plan.policy_candidates(STATES)[:, 1:], proposed[:, 1:])

    @pytest.mark.parametrize("count", [0, 1, 128])
    def test_none_or_one_or_all(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = planner(policy=BEST_POLICY, num_policy_candidates=count)
        rounds = seen(plan, monkeypatch)
        action = plan(STATES.clone())["action"]
        assert rounds[0].shape[1] == 128
        if count == 128:
            torch.testing.assert_close(action, -STATES["latent"] @ K.T)

    def test_a_good_policy_is_found_where_chance_does_not_find_it(self) -> None:
        """Reward in a needle's eye, a thousandth of the range: only the policy hits it."""

        def needle(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return z, ((a - 0.7654).abs() < 1e-3).float(), never(z), never(z)

        knows = module(lambda z: 0 * z[..., :1] + 0.7654, "action")
        options = {"temperature": 1e3, "min_std": 1e-4, "top_k": 1, "planning_horizon": 1, "num_candidates": 32}
        found = planner(Model(needle), knows, **options)(STATES.clone())["action"]
        torch.testing.assert_close(found, torch.full((3, 1), 0.7654), atol=1e-3, rtol=0)

    def test_returns_are_sums_of_discounted_rewards_and_the_value(self) -> None:
        plan = planner(value=BEST_VALUE, planning_horizon=4)
        candidates = torch.rand(3, 7, 4, 1) * 2 - 1
        z = STATES["latent"].unsqueeze(1).expand(3, 7, D)
        expected = torch.zeros(3, 7, 1)
        for t in range(4):
            z, reward, *_ = linear(z, candidates[:, :, t])
            expected += GAMMA**t * reward
        expected += GAMMA**4 * BEST_VALUE.module(z)
        torch.testing.assert_close(plan.candidate_returns(STATES, candidates), expected.squeeze(-1))

    @pytest.mark.parametrize("terminated", [True, False])
    def test_a_candidate_ends_where_it_is_done(self, terminated: bool) -> None:
        """Steps count 1, 2, 3; those with a positive action end. After a termination there is no value."""

        def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            z = z + 1
            ends = a > 0
            return z, z[..., :1], ends & terminated, ends

        plan = planner(Model(step), value=module(lambda z: 100 * z[..., :1], "state_value"), gamma=0.5)
        start = state((0.0, 0.0))
        actions = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]).view(1, 3, 3, 1)
        value = torch.tensor([37.5, 0.0 if terminated else 50.0, 0.0 if terminated else 50.0])
        torch.testing.assert_close(plan.candidate_returns(start, actions)[0], torch.tensor([2.75, 2.0, 1.0]) + value)

    def test_what_is_not_finite_comes_last(self) -> None:
        def fragile(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return z, torch.where(a > 0, torch.nan, a), never(z), never(z)

        options = {"planning_horizon": 1, "temperature": 20.0, "min_std": 0.01}
        action = planner(Model(fragile), **options)(STATES.clone())["action"]
        assert ((action > -0.1) & (action < 0.1)).all()

        def broken(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return z, a * torch.nan, never(z), never(z)

        with pytest.raises(DivergenceError, match="finite return"):
            planner(Model(broken))(STATES.clone())


class TestElites:
    def test_weights(self) -> None:
        """Large returns do not overflow, as exp(temperature · J) would."""
        plan = planner(temperature=0.5, top_k=2)
        candidates = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        elites, weight = plan._elites(candidates, torch.tensor([[1e4, 1e4 + 2, 1e4 - 50]]))
        torch.testing.assert_close(elites.flatten(), torch.tensor([0.2, 0.1]))
        torch.testing.assert_close(weight.flatten(), torch.softmax(torch.tensor([1.0, 0.0]), 0))

    def test_without_temperature_they_weigh_the_same(self) -> None:
        plan = planner(temperature=0.0, top_k=3)
        weight = plan._elites(torch.rand(1, 5, 1, 1), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))[1]
        torch.testing.assert_close(weight.flatten(), torch.full((3,), 1 / 3))

    def test_a_single_one_is_the_best_candidate(self) -> None:
        plan = planner(top_k=1, optim_steps=1, num_policy_candidates=0)
        torch.manual_seed(1)
        action = plan(STATES.clone())["action"]
        torch.manual_seed(1)
        candidates = (torch.randn(3, 128, 3, 1) * 2).clamp(-1, 1)
        best = plan.candidate_returns(STATES, candidates).argmax(1)
        torch.testing.assert_close(action, candidates[torch.arange(3), best, 0])
