"""The TensorDict modules around the plain networks: keys, specs, vmap, functional calls, composition, copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import Bounded, Composite
from torchrl.envs import ExplorationType, set_exploration_type

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    WorldModelSpec,
    actor_module,
    encoder_module,
    make_world_model,
    policy_module,
    value_module,
    world_model_module,
)

OBS, A, D, N, DIMS = 5, 3, 16, 4, (3, 1, 2, 3)
FLOW = {"kind": "flow", "substeps": 2}


def world_model(tasks: bool = False, **kwargs: object) -> WorldModel:
    multi = {"num_tasks": N, "task_dim": 6, "action_dims": DIMS} if tasks else {}
    model = make_world_model(WorldModelSpec(OBS, A, D, [24], [20], **multi, **kwargs))
    for p in model.reward.parameters():  # its last layer starts at zero, which would hide mistakes
        nn.init.normal_(p, std=0.3)
    return model


def random_critics() -> CriticEnsemble:
    critics = CriticEnsemble(D, [10])
    with torch.no_grad():
        critics.params[-2].normal_()
    return critics


class TestWrapping:
    """Each wraps the plain network, with any keys, nested ones too."""

    def test_encoder(self) -> None:
        model, o, task = world_model(True), torch.randn(2, 4, OBS), torch.tensor([[0, 1, 2, 3]] * 2)
        module = encoder_module(model, observation=("obs", "vector"), latent=("state", "z"), task=("info", "task"))
        data = TensorDict({"obs": {"vector": o}, "info": {"task": task}}, [2, 4])
        assert torch.equal(module(data)["state", "z"], model.encode(o, task))

    def test_world_model(self) -> None:
        model, z, a = world_model(termination=True), torch.rand(4, D), torch.rand(4, A)
        default = world_model_module(model)(TensorDict(latent=z, action=a, batch_size=[4]))
        keys = {
            "latent": ("s", "z"),
            "action": ("s", "a"),
            "next_latent": ("next", "s", "z"),
            "reward": ("next", "s", "r"),
        }
        nested = world_model_module(model, **keys, terminated=("next", "s", "end"))
        out = nested(TensorDict({"s": {"z": z, "a": a}}, [4]))
        expected = model(z, a)
        for key, other, value in zip(("latent", "reward", "terminated"), ("z", "r", "end"), expected, strict=True):
            assert torch.equal(default["next", key], value)
            assert torch.equal(out["next", "s", other], value)

    def test_actor_follows_the_exploration_type(self) -> None:
        actor, z = Actor(D, A, [16]), torch.rand(5, D)
        module = actor_module(actor, latent=("s", "z"), action=("s", "a"))
        data = TensorDict({"s": {"z": z}}, [5])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            torch.testing.assert_close(module(data.clone())["s", "a"], actor.act(z))
        first, second = module(data.clone())["s", "a"], module(data.clone())["s", "a"]
        assert not torch.equal(first, second), "samples by default"
        assert first.abs().max() <= 1

    def test_value_is_the_minimum(self) -> None:
        critics, z = CriticEnsemble(D, [16]), torch.rand(3, 5, D)
        module = value_module(critics, latent=("s", "z"), state_value=("s", "v"))
        out = module(TensorDict({"s": {"z": z}}, [3, 5]))
        assert torch.equal(out["s", "v"], critics(z).min(0).values)

    def test_policy_acts_on_encoded_observations(self) -> None:
        model, actor, o = world_model(), Actor(D, A, [16]), torch.randn(5, OBS)
        policy = policy_module(model, actor, observation=("o", "v"), action=("x", "a"))
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            out = policy(TensorDict({"o": {"v": o}}, [5]))
        torch.testing.assert_close(out["x", "a"], actor.act(model.encode(o)))

    def test_policy_masks_padding_actions(self) -> None:
        model, actor, task = world_model(True), Actor(D, A, [16]), torch.tensor([0, 1, 2, 3])
        out = policy_module(model, actor, task="task")(
            TensorDict(observation=torch.randn(4, OBS), task=task, batch_size=[4])
        )
        assert torch.equal(out["action"] != 0, model.task.mask(task) > 0)

    def test_modules_share_the_networks_parameters(self) -> None:
        model = world_model()
        assert {id(p) for p in world_model_module(model).parameters()} == {id(p) for p in model.parameters()}


@dataclass(frozen=True)
class Shell:
    """A TensorDict module over networks of its own, and the keys that it should have."""

    make: Callable[[], TensorDictModuleBase]
    in_keys: list[NestedKey]
    out_keys: list[NestedKey]

    def data(self, *size: int) -> TensorDict:
        widths = {"observation": OBS, "latent": D, "action": A}
        data = TensorDict({key: torch.rand(*size, widths[key]) for key in self.in_keys if key in widths}, size)
        if "task" in self.in_keys:
            data["task"] = torch.arange(N).expand(size)
        return data


STEP = [("next", "latent"), ("next", "reward"), ("next", "terminated")]
SHELLS = {
    "encoder": Shell(lambda: encoder_module(world_model()), ["observation"], ["latent"]),
    "encoder, multi-task": Shell(
        lambda: encoder_module(world_model(True), task="task"), ["observation", "task"], ["latent"]
    ),
    "world model": Shell(lambda: world_model_module(world_model()), ["latent", "action"], STEP),
    "world model, flow, multi-task": Shell(
        lambda: world_model_module(world_model(True, dynamics=FLOW, termination=True), task="task"),
        ["latent", "action", "task"],
        STEP,
    ),
    "actor": Shell(lambda: actor_module(Actor(D, A, [10])), ["latent"], ["loc", "scale", "action"]),
    "value": Shell(lambda: value_module(random_critics()), ["latent"], ["state_value"]),
    "policy": Shell(
        lambda: policy_module(world_model(True), Actor(D, A, [10]), task="task"),
        ["observation", "task"],
        ["latent", "loc", "scale", "action"],
    ),
}
every_shell = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)


def called(module: TensorDictModuleBase, data: TensorDict) -> TensorDict:
    """Without noise, on a copy of the data, in a sequence's first-written order."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        return module(data.clone()).select(*dict.fromkeys(module.out_keys))


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float = 0.0) -> None:
    assert set(actual.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        torch.testing.assert_close(actual[key], expected[key], rtol=tolerance, atol=tolerance)


def set_parameters(module: nn.Module, factor: float) -> TensorDict:
    """The module's tensors, its parameters scaled."""
    return TensorDict.from_module(module).data.apply(lambda x: x * factor if x.is_floating_point() else x)


@every_shell
class TestContract:
    """What holds for every TensorDictModule of TorchRL's."""

    def test_keys(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(2, N)
        assert module.in_keys == shell.in_keys
        assert list(dict.fromkeys(module.out_keys)) == shell.out_keys
        out = module(data)
        assert out is data
        assert set(out.keys(True, True)) == {*shell.in_keys, *shell.out_keys}

    def test_called_with_tensors(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(N)
        expected = called(module, data)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            out = module(*(data[key] for key in shell.in_keys))
        out = out if isinstance(out, tuple) else (out,)
        for key, tensor in zip(module.out_keys, out, strict=True):
            assert torch.equal(tensor, expected[key])

    def test_select_out_keys(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(N)
        last = shell.out_keys[-1]
        module.select_out_keys(last)
        assert set(module(data).keys(True, True)) == {*shell.in_keys, last}

    def test_vmap_over_parameters_is_a_loop_over_networks(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(N)
        each = [set_parameters(module, factor) for factor in (1.0, 0.6, 1.3)]

        def call(parameters: TensorDict) -> TensorDict:
            with parameters.to_module(module, preserve_module_state=False):
                return called(module, data)

        mapped = torch.vmap(call, randomness="same")(torch.stack(each))
        for k, parameters in enumerate(each):
            assert_equal(mapped[k], call(parameters), 1e-5)
        assert any(not torch.equal(mapped[0][key], mapped[1][key]) for key in shell.out_keys)

    def test_functional_call(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(N)
        before = {name: p.clone() for name, p in module.named_parameters()}
        halved = {name: 0.5 * p for name, p in before.items()}
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            out = torch.func.functional_call(module, halved, (data.clone(),)).select(*shell.out_keys)
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.5)
        assert_equal(out, called(module, data))

    def test_copies(self, shell: Shell) -> None:
        module, data = shell.make(), shell.data(N)
        expected = called(module, data)
        for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_equal(called(copy, data), expected)
            assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in module.parameters()}

    def test_reset_parameters_recursive(self, shell: Shell) -> None:
        module = shell.make()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1000)
        module.reset_parameters_recursive()
        assert all(p.abs().max() < 10 for p in module.parameters())


class TestComposition:
    def test_the_parts_in_a_row_are_one_imagined_step(self) -> None:
        model, actor, critics = world_model(), Actor(D, A, [10]), CriticEnsemble(D, [10])
        chain = TensorDictSequential(
            encoder_module(model),
            actor_module(actor),
            world_model_module(model),
            value_module(critics, latent=("next", "latent"), state_value=("next", "state_value")),
        )
        assert chain.in_keys == ["observation"]
        o = torch.randn(2, 3, OBS)
        out = called(chain, TensorDict(observation=o, batch_size=[2, 3]))
        z, r, _ = model(model.encode(o), actor.act(model.encode(o)))
        torch.testing.assert_close(out["next", "latent"], z)
        torch.testing.assert_close(out["next", "reward"], r)
        torch.testing.assert_close(out["next", "state_value"], critics.value(z))
        assert {id(p) for p in chain.parameters()} == {id(p) for m in (model, actor, critics) for p in m.parameters()}

    def test_a_part_of_the_row(self) -> None:
        model = world_model()
        chain = TensorDictSequential(encoder_module(model), actor_module(Actor(D, A, [10])), world_model_module(model))
        part = chain.select_subsequence(in_keys=["latent"], out_keys=["action"])
        assert part.in_keys == ["latent"]
        assert "observation" not in part(TensorDict(latent=torch.rand(3, D), batch_size=[3])).keys()

    def test_two_policies_side_by_side(self) -> None:
        """Every entry that they write has a key of its own."""
        parts = [
            policy_module(world_model(), Actor(D, A, [10]), latent=(k, "z"), action=(k, "action")) for k in ("a", "b")
        ]
        out = called(TensorDictSequential(*parts), TensorDict(observation=torch.randn(3, OBS), batch_size=[3]))
        assert not torch.equal(out["a", "z"], out["b", "z"])
        assert not torch.equal(out["a", "action"], out["b", "action"])

    def test_distribution_parameters_have_keys(self) -> None:
        actor = Actor(D, A, [10])
        module = actor_module(actor, loc=("p", "m"), scale=("p", "s"))
        assert module.out_keys == [("p", "m"), ("p", "s"), "action"]
        out = module(TensorDict(latent=torch.rand(3, D), batch_size=[3]))
        for key, expected in zip(("m", "s"), actor(out["latent"]), strict=True):
            assert torch.equal(out["p", key], expected)


class TestSpecs:
    def test_of_the_actor(self) -> None:
        spec = Bounded(-1, 1, (A,))
        module = actor_module(Actor(D, A, [10]), action_spec=spec)
        assert module.spec["action"] == spec
        for _ in range(5):
            action = module(TensorDict(latent=10 * torch.randn(64, D), batch_size=[64]))["action"]
            assert Bounded(-1, 1, (64, A)).is_in(action)

    def test_of_the_policy_under_a_nested_key(self) -> None:
        spec = Composite({("agent", "action"): Bounded(-1, 1, (A,))})
        policy = policy_module(
            world_model(), Actor(D, A, [10]), action_spec=spec["agent", "action"], action=("agent", "action")
        )
        out = policy(TensorDict(observation=torch.randn(A), batch_size=[]).set("observation", torch.randn(OBS)))
        assert spec.is_in(out.select(("agent", "action")))

    def test_latents_and_rewards_keep_shape_and_type(self) -> None:
        model = world_model(termination=True).double()
        data = TensorDict(latent=torch.rand(2, 3, D), action=torch.rand(2, 3, A), batch_size=[2, 3]).double()
        out = world_model_module(model)(data)["next"]
        assert {key: (tuple(x.shape), x.dtype) for key, x in out.items()} == {
            "latent": ((2, 3, D), torch.float64),
            "reward": ((2, 3, 1), torch.float64),
            "terminated": ((2, 3, 1), torch.bool),
        }
