"""Freezing, delaying and keeping apart the networks that a loss computes with."""

from __future__ import annotations

import contextlib

import pytest
import torch
from objective_cases import D, Networks, gradients, no_gradients
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import actor_module, world_model_module
from pwm_torchrl.objectives import PWMActorLoss
from pwm_torchrl.objectives.base import apart, frozen


def refuse(*_: object) -> None:
    raise MemoryError


class TestFrozen:
    def test_nothing_inside_asks_for_a_gradient(self) -> None:
        """Else those of the world model's weights would be computed and thrown away with every policy update."""
        n, seen = Networks(), []
        hooks = [
            layer.register_forward_hook(lambda layer, *_: seen.append(layer.weight.requires_grad))
            for layer in n.model.modules()
            if isinstance(layer, nn.Linear)
        ]
        z = torch.rand(4, D, requires_grad=True)
        with frozen(n.model, n.critics):
            out = n.model(z, torch.rand(4, 3))[0]
            value = n.critics.value(z)
        assert len(hooks) > 4
        assert seen
        assert not any(seen)
        assert torch.autograd.grad(out.sum() + value.sum(), z)[0].abs().max() > 0
        assert all(p.requires_grad for p in n.model.parameters())

    def test_nothing_is_saved_for_the_gradients_of_weights(self) -> None:
        layer, x = nn.Linear(5, 7), torch.rand(3, 5, requires_grad=True)
        saved: list[torch.Tensor] = []
        with (
            frozen(layer),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            layer(x)
        assert {tuple(t.shape) for t in saved} in ({(7, 5)}, {(5, 7)}), "the weight, for the input's gradient"

    @pytest.mark.parametrize("fails", [False, True])
    def test_what_was_there_comes_back(self, fails: bool) -> None:
        n = Networks(True, normalize_observations=True, reward_head="two_hot")
        modules = (n.model, n.critics)

        def tensors() -> dict[str, torch.Tensor]:
            named = {}
            for k, module in enumerate(modules):
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    named[f"{k}.{name}"] = tensor
            return named

        before, state = tensors(), [list(m.state_dict()) for m in modules]
        with contextlib.suppress(MemoryError), frozen(*modules):
            if fails:
                raise MemoryError
        after = tensors()
        assert list(after) == list(before)
        assert all(after[name] is tensor for name, tensor in before.items())
        assert [list(m.state_dict()) for m in modules] == state

    def test_an_update_that_runs_out_of_memory_leaves_the_networks_as_they_were(self) -> None:
        n = Networks()
        ids = [id(p) for m in (n.model, n.actor, n.critics) for p in m.parameters()]
        data, loss = n.start(), n.loss()
        handle = n.critics.register_forward_pre_hook(refuse)
        with pytest.raises(MemoryError):
            loss.backward(data)
        handle.remove()
        assert [id(p) for m in (n.model, n.actor, n.critics) for p in m.parameters()] == ids
        loss.backward(data)
        assert not no_gradients(n.actor)


class TestApart:
    def test_only_what_is_shared_is_copied(self) -> None:
        shared, one, other = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 2)
        a, b = nn.Sequential(shared, one), nn.Sequential(shared, other)
        assert apart(one, other) is one
        copy = apart(a, b)
        assert copy is not a
        assert not {id(p) for p in copy.parameters()} & {id(p) for p in a.parameters()}

    def test_a_trained_policy_is_the_one_that_was_given(self) -> None:
        n = Networks()
        trunk = nn.Linear(D, D)
        actor = TensorDictSequential(
            TensorDictModule(nn.Sequential(trunk, nn.Tanh(), n.actor), ["latent"], ["loc", "scale"])
        )
        values = TensorDictModule(nn.Sequential(trunk, nn.Linear(D, 1)), ["latent"], ["state_value"])
        loss = PWMActorLoss(actor, world_model_module(n.model), values, horizon=2, deterministic=True)
        data = n.start()
        before = loss(data)["loss_actor"].item()
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.5)
        loss(data)["loss_actor"].backward()
        optimizer.step()
        assert loss(data)["loss_actor"].item() < before

    def test_delayed_values_need_a_network_of_their_own(self) -> None:
        n = Networks()
        values = TensorDictModule(nn.Sequential(n.model.dynamics.net[0], nn.Linear(12, 1)), ["latent"], ["state_value"])
        with pytest.raises(ConfigurationError, match=r"delay_value=True .*shares parameters with the world model"):
            PWMActorLoss(actor_module(n.actor), world_model_module(n.model), values, delay_value=True)

    def test_delayed_values_start_as_the_network_and_stay_there(self) -> None:
        n = Networks()
        loss = n.loss(delay_value=True)
        with torch.no_grad():
            for p in n.critics.parameters():
                p.zero_()
        assert all(t.any() for key, t in loss.state_dict().items() if key.startswith("target_") and "weight" in key)
        with pytest.warns(UserWarning, match="No target network updater"):
            value = loss(n.start())["loss_actor"]
        assert all(g is not None for g in gradients(value, n.actor))
