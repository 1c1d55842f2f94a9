"""PWMActorLoss over world models that are not ours: any TensorDictModule with the keys of the loss."""

from __future__ import annotations

import pytest
import torch
from objective_cases import H, Networks, gradients, no_gradients
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from pwm_torchrl.modules import actor_module, value_module, world_model_module
from pwm_torchrl.objectives import PWMActorLoss

OUT_KEYS = [("next", "latent"), ("next", "reward"), ("next", "terminated")]


class TestForeignWorldModels:
    """Any TensorDictModule with the keys of the loss."""

    @staticmethod
    def sequence(n: Networks) -> TensorDictSequential:
        """The same model, one module for each of its parts."""
        model = n.model
        return TensorDictSequential(
            TensorDictModule(model.dynamics, in_keys=["latent", "action"], out_keys=[("next", "latent")]),
            TensorDictModule(model.reward, in_keys=["latent", "action"], out_keys=["logits"]),
            TensorDictModule(model.reward.decode, in_keys=["logits"], out_keys=[("next", "reward")]),
            TensorDictModule(
                lambda r: torch.zeros_like(r, dtype=torch.bool),
                in_keys=[("next", "reward")],
                out_keys=[("next", "terminated")],
            ),
        )

    def test_sequential_equals_the_world_model(self) -> None:
        n = Networks(reward_head="two_hot")
        data, results = n.start(), []
        for model in (world_model_module(n.model), self.sequence(n)):
            loss = PWMActorLoss(actor_module(n.actor), model, value_module(n.critics), horizon=H, deterministic=True)
            value = loss(data)["loss_actor"]
            value.backward(retain_graph=True)
            results.append([value, *gradients(value, n.actor.net)])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
        assert no_gradients(n.model, n.critics)

    def test_a_differentiable_environment_without_parameters(self) -> None:
        n = Networks()

        def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return (
                z + 0.1 * a.mean(-1, keepdim=True),
                -a.square().sum(-1, keepdim=True),
                torch.zeros(len(a), 1, dtype=torch.bool),
            )

        zero = TensorDictModule(lambda z: 0 * z[..., :1], ["latent"], ["state_value"])
        loss = PWMActorLoss(
            actor_module(n.actor),
            TensorDictModule(step, ["latent", "action"], OUT_KEYS),
            zero,
            horizon=H,
            deterministic=True,
        )
        optimizer, data = torch.optim.Adam(loss.parameters(), lr=1e-2), n.start(64)
        for _ in range(100):
            optimizer.zero_grad()
            out = loss(data)
            out["loss_actor"].backward()
            optimizer.step()
        assert -0.05 < out["imagined_reward"] <= 0, "the best action is 0"

    def test_deterministic_actor_that_is_a_plain_module(self) -> None:
        n = Networks()
        actor = TensorDictModule(n.actor, in_keys=["latent"], out_keys=["loc", "scale"])
        loss = PWMActorLoss(actor, world_model_module(n.model), value_module(n.critics), horizon=H, deterministic=True)
        data = n.start()
        assert torch.equal(loss(data)["loss_actor"], n.loss(deterministic=True)(data)["loss_actor"])

    def test_scale_of_rewards_cancels(self) -> None:
        n, results = Networks(), []
        data = n.start()
        for factor in (1e2, 1e4):

            def step(z: Tensor, a: Tensor, factor: float = factor) -> tuple[Tensor, ...]:
                z, r, end = n.model(z, a)
                return z, factor * r, end

            class Scaled(nn.Module):
                def forward(self, z: Tensor, factor: float = factor) -> Tensor:
                    return factor * n.critics.value(z)

            foreign = TensorDictModule(step, ["latent", "action"], OUT_KEYS)
            loss = PWMActorLoss(
                actor_module(n.actor), foreign, TensorDictModule(Scaled(), ["latent"], ["state_value"]),
                horizon=H, normalize_returns=True, deterministic=True,
            )  # fmt: skip
            results.append(loss(data)["loss_actor"])
        torch.testing.assert_close(*results, rtol=1e-2, atol=0)

    def test_termination_stops_the_sum_and_the_value(self) -> None:
        """Every rollout ends in step 2 of 5: what the model says later, and its value, do not matter."""

        def losses(reward_after: float, value: float) -> Tensor:
            count = []

            def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
                count.append(1)
                t = len(count) - 1
                r = a.sum(-1, keepdim=True) + (reward_after if t > 2 else 1.0)
                return z, r, torch.full_like(r, t == 2, dtype=torch.bool)

            n = Networks()
            torch.manual_seed(0)
            foreign = TensorDictModule(step, ["latent", "action"], OUT_KEYS)
            critic = TensorDictModule(lambda z: torch.full_like(z[..., :1], value), ["latent"], ["state_value"])
            loss = PWMActorLoss(actor_module(n.actor), foreign, critic, horizon=5, gamma=0.5, deterministic=True)
            out = loss.rollout_and_loss(n.start())
            assert out[0]["terminated"] == 1
            assert out[1]["collector", "mask"][0].flatten().tolist() == [True, True, True, False, False]
            a = out[1]["action"].sum(-1)
            j = sum(0.5**t * (a[:, t] + 1) for t in range(3))
            torch.testing.assert_close(out[0]["loss_actor"].detach(), -j.mean() / 5)
            return out[0]["loss_actor"]

        assert torch.equal(losses(0.0, 0.0), losses(1e6, -1e6))

    def test_mask_protects_foreign_models_that_do_not_mask(self) -> None:
        n, seen = Networks(True), []

        def step(z: Tensor, a: Tensor, task: Tensor) -> tuple[Tensor, ...]:
            seen.append(a)
            return z, a.sum(-1, keepdim=True), torch.zeros(len(a), 1, dtype=torch.bool)

        foreign = TensorDictModule(step, ["latent", "action", "task"], OUT_KEYS)
        mask = n.model.task.action_mask
        loss = PWMActorLoss(actor_module(n.actor), foreign, value_module(n.critics), horizon=2, action_mask=mask)
        data = n.start()
        loss(data)
        assert all(torch.equal(a != 0, n.model.task.mask(data["task"]) > 0) for a in seen)

    @pytest.mark.parametrize("part", ["reward", "terminated", "value"])
    def test_flat_outputs_of_a_foreign_model_raise(self, part: str) -> None:
        n = Networks()

        def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            z, r, end = n.model(z, a)
            return z, r.squeeze(-1) if part == "reward" else r, end.squeeze(-1) if part == "terminated" else end

        def value(z: Tensor) -> Tensor:
            v = n.critics.value(z)
            return v.squeeze(-1) if part == "value" else v

        loss = PWMActorLoss(
            actor_module(n.actor), TensorDictModule(step, ["latent", "action"], OUT_KEYS),
            TensorDictModule(value, ["latent"], ["state_value"]), horizon=H,
        )  # fmt: skip
        with pytest.raises(ValueError, match="nothing is broadcast"):
            loss(n.start())
