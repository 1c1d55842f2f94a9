"""Planning with a policy's proposals and a terminal value, in models whose best actions are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import Categorical
from torchrl.envs import ExplorationType, TransformedEnv, set_exploration_type
from torchrl.modules.planners import MPCPlannerBase

from pwm_torchrl.envs import LatentImaginationEnv, PolicySeededMPPI
from pwm_torchrl.errors import ConfigurationError, DivergenceError
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
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


# A planner as TorchRL's policies are ----------------------------------------------------------------------------------


class TestActing:
    def test_exploration(self) -> None:
        """The mean, which differs between calls by the candidates' noise alone, or one of the elites and noise."""
        plan = planner(value=BEST_VALUE, temperature=20.0, min_std=0.2, num_candidates=256)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            certain = torch.stack([plan(STATES.clone())["action"] for _ in range(10)])
        with set_exploration_type(ExplorationType.RANDOM):
            random = torch.stack([plan(STATES.clone())["action"] for _ in range(10)])
        assert certain.std(0).max() < 0.05 < 0.1 < random.std(0).min()
        assert random.abs().max() <= 1

    @pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
    def test_batches(self, shape: tuple[int, ...]) -> None:
        data = TensorDict(latent=0.4 * torch.rand(*shape, D), other=torch.zeros(shape), batch_size=shape)
        plan = planner(value=BEST_VALUE, temperature=20.0, min_std=0.01)
        out = plan(data)
        assert out is data
        assert out["action"].shape == (*shape, 1)
        torch.testing.assert_close(out["action"], -data["latent"] @ K.T, atol=0.05, rtol=0)
        assert set(data.keys()) == {"latent", "other", "action"}

    def test_it_is_one_of_torchrls_planners(self) -> None:
        plan = planner(warm_start=True)
        assert isinstance(plan, MPCPlannerBase)
        assert plan.in_keys == ["latent", "plan"]
        assert plan.out_keys == ["action", ("next", "plan")]
        assert not plan(state((0.1, 0.2), plan=torch.zeros(1, 3, 1)))["action"].requires_grad

    @pytest.mark.parametrize("tasks", [0, 2])
    def test_a_world_model_of_ours(self, tasks: int) -> None:
        """Through imagination as an environment, which carries the task of a model of several."""
        several = {"num_tasks": tasks, "task_dim": 4, "action_dims": [1, 2]} if tasks else {}
        model = make_world_model(
            WorldModelSpec(3, 2, 16, [32], [32], termination=True, dynamics={"kind": "flow"}, **several)
        )
        task = torch.tensor([0, 1, 1, 0])
        index = (task,) if tasks else ()
        data = TensorDict(latent=model.encode(torch.randn(4, 3), *index).detach(), batch_size=[4])
        if tasks:
            data.set("task", task)
        plan = planner(
            LatentImaginationEnv(model), actor_module(Actor(16, 2, [32])), value_module(CriticEnsemble(16, [32]))
        )
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert plan(data)["action"].shape == (4, 2)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in plan.parameters())


class TestWarmStart:
    def test_the_plan_of_the_step_before_is_shifted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = planner(warm_start=True, num_policy_candidates=0, max_std=0.06, num_candidates=4096)
        rounds = seen(plan, monkeypatch)
        before = torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1).expand(3, 3, 1)
        torch.manual_seed(1)
        out = plan(STATES.clone().set("plan", before))
        torch.testing.assert_close(rounds[0].mean(1), before, atol=0.01, rtol=0)
        torch.manual_seed(1)
        mean = plan.plan(STATES.clone().set("plan", before))[1]
        assert (out["next", "plan"][:, 2] == 0).all()
        torch.testing.assert_close(out["next", "plan"][:, :2], mean[:, 1:])

    @staticmethod
    def acting(plan: PolicySeededMPPI) -> TransformedEnv:
        """Two environments, the first of which ends after its second step."""
        steps = [0]

        def ends(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            steps[0] += 1
            done = torch.tensor([[steps[0] == 2], [False]])
            return *linear(z, a)[:2], done, done

        env = Model(ends, batch=(2,))
        env._batch_locked = True
        return TransformedEnv(env, plan.make_tensordict_primer())

    def test_it_goes_from_step_to_step_and_ends_with_the_episode(self) -> None:
        plan = planner(value=BEST_VALUE, warm_start=True)
        data = self.acting(plan).rollout(4, plan, break_when_any_done=False)
        carried, written = data["plan"], data["next", "plan"]
        assert (carried[:, 0] == 0).all()
        torch.testing.assert_close(carried[1, 1:], written[1, :-1])
        torch.testing.assert_close(carried[0, 1], written[0, 0])
        assert (carried[0, 2] == 0).all()
        assert (written[:, :, :2] != 0).all()

    def test_collectors_make_room_for_it(self) -> None:
        plan = planner(value=BEST_VALUE, warm_start=True, num_candidates=16, top_k=4)
        env = Model(batch=(2,))
        env._batch_locked = True
        collector = Collector(env, plan, frames_per_batch=6, total_frames=6, auto_register_policy_transforms=True)
        data = next(iter(collector))
        torch.testing.assert_close(data["plan"][:, 1:], data["next", "plan"][:, :-1])
        collector.shutdown()

    def test_without_a_place_for_the_plan(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'plan'.*make_tensordict_primer\(\).*warm_start=False"):
            planner(warm_start=True)(STATES.clone())


class TestBadArguments:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"planning_horizon": 0}, "planning_horizon=0 must be at least 1."),
            ({"optim_steps": 0}, "optim_steps=0 must be at least 1."),
            ({"num_policy_candidates": 129}, "num_policy_candidates=129 must be between 0 and num_candidates=128."),
            ({"num_policy_candidates": -1}, "num_policy_candidates=-1 must be between 0 and num_candidates=128."),
            ({"top_k": 0}, "top_k=0 must be between 1 and num_candidates=128."),
            ({"top_k": 129}, "top_k=129 must be between 1 and num_candidates=128."),
            ({"temperature": -0.1}, "temperature=-0.1 must not be negative."),
            ({"min_std": 0.0}, "min_std=0.0 must be positive and at most max_std=2.0."),
            ({"min_std": 3.0}, "min_std=3.0 must be positive and at most max_std=2.0."),
            ({"gamma": 1.5}, "gamma=1.5 must be above 0 and at most 1."),
        ],
    )
    def test_numbers(self, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            planner(**changes)
        assert str(caught.value) == sentence

    def test_environments(self) -> None:
        locked, discrete = Model(), Model()
        locked._batch_locked = True
        discrete.action_spec = Categorical(3)
        with pytest.raises(ConfigurationError, match="batch_locked"):
            planner(locked)
        with pytest.raises(ConfigurationError, match="Categorical"):
            planner(discrete)
