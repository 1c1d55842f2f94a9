"""A planner as TorchRL's policies are: batches, exploration, its plan from step to step, and what it refuses."""

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
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
)

from .mppi_cases import BEST_VALUE, STATES, D, K, Model, linear, planner, seen, state


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
