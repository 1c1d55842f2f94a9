"""What TorchRL asks of a loss, one check each, equivalent to the base class of its own losses' tests.

A check takes a case and holds for every loss, or :data:`NOT_MEANINGFUL` says why it cannot, and shows it.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from conformity_cases import BATCH, HORIZON, Case
from objective_cases import A, D, randomized
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from tensordict.utils import unravel_key
from torch import nn
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.objectives.common import LossModule
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator
from torchrl.objectives.value.functional import td_lambda_return_estimate

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import CriticEnsemble, value_module
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Make a function one of the checks; its docstring says in one line what conforms."""
    CHECKS[function.__name__] = function
    return function


def called(loss: LossModule, *args: object, **kwargs: object) -> object:
    """The loss with the same random numbers in every call."""
    torch.manual_seed(3)
    return loss(*args, **kwargs)


def assert_equal(actual: TensorDictBase, expected: TensorDictBase, **tolerance: float) -> None:
    assert set(actual.keys()) == set(expected.keys())
    for key in expected.keys():
        torch.testing.assert_close(actual[key], expected[key], **{"rtol": 0.0, "atol": 0.0, **tolerance})


def total(out: TensorDictBase) -> torch.Tensor:
    return sum(value for key, value in out.items() if key.startswith("loss_"))


def scrambled(loss: LossModule) -> LossModule:
    """The loss with other parameters, and other buffers of statistics."""
    with torch.no_grad():
        for tensor in [*loss.parameters(), *(b for b in loss.buffers() if b.is_floating_point())]:
            tensor.mul_(0.5).add_(0.1)
    return loss


def own_networks(loss: LossModule) -> dict[str, nn.Module]:
    """The networks that the loss trains, by name."""
    names = [name.removesuffix("_params") for name in loss._modules if name.endswith("_params")]
    return {name: getattr(loss, name) for name in names if not name.startswith("target_")}


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)


# Keys -----------------------------------------------------------------------------------------------------------------


@check
def keys_are_settable(case: Case) -> None:
    """every key set by `set_keys`, reset by `None`; an unknown one is refused"""
    loss, defaults = case.make(), case.loss.default_keys()
    names = [f.name for f in fields(defaults)]
    assert set(names) == set(case.keys), "the cases rename every key"
    for name in names:
        assert getattr(loss.tensor_keys, name) == getattr(defaults, name)
        loss.set_keys(**{name: case.keys[name]})
        assert getattr(loss.tensor_keys, name) == case.keys[name]
        loss.set_keys(**{name: None})
    assert loss.tensor_keys == defaults
    with pytest.raises(ValueError, match="unknown_key is not an accepted tensordict key"):
        loss.set_keys(unknown_key="x")


@check
def nested_keys(case: Case) -> None:
    """the same under nested keys, everywhere"""
    loss = case.make(nested=True)
    assert all(isinstance(key, tuple) and key == unravel_key(key) for key in loss.in_keys)
    assert_equal(called(loss, case.nested_data()), called(case.make(), case.data()))


@check
def dispatch(case: Case) -> None:
    """called with tensors, by position or by name, nested ones too"""
    expected = called(case.make(), case.data())
    for loss, data in ((case.make(), case.data()), (case.make(nested=True), case.nested_data())):
        by_position = [data[key] for key in loss.in_keys]
        by_name = {"_".join(key if isinstance(key, tuple) else (key,)): data[key] for key in loss.in_keys}
        for copy, args, kwargs in ((deepcopy(loss), by_position, {}), (loss, [], by_name)):
            out = called(copy, *args, **kwargs)
            assert isinstance(out, tuple)
            assert_equal(TensorDict(dict(zip(copy.out_keys, out, strict=True))), expected)


@check
def in_keys_exact(case: Case) -> None:
    """`in_keys` are what is read: without one it raises, everything else may be missing; the input stays as it was"""
    expected, data = called(case.make(), case.data()), case.data()
    keys = case.make().in_keys
    assert len(keys) == len(set(keys))
    alone = data.select(*keys)
    before = alone.clone()
    assert_equal(called(case.make(), alone), expected)
    assert set(alone.keys(True, True)) == set(before.keys(True, True))
    assert_equal(alone.flatten_keys("."), before.flatten_keys("."))
    data["something", "else"] = torch.full((*data.shape, 7), float("nan"))
    assert_equal(called(case.make(), data), expected)
    for key in keys:
        with pytest.raises(KeyError):
            called(case.make(), alone.exclude(key))


@check
def out_keys_exact(case: Case) -> None:
    """`out_keys` are what is returned, losses with a graph and the rest detached; `select_out_keys`"""
    loss, data = case.make(), case.data()
    out = called(loss, data)
    assert list(out.keys()) == loss.out_keys
    assert {key for key in loss.out_keys if key.startswith("loss_")} == set(case.trains)
    for key, value in out.items():
        assert value.shape == ()
        assert value.requires_grad == key.startswith("loss_"), key
    for keys in (loss.out_keys[:1], loss.out_keys[::-1]):
        selected = case.make()
        selected.select_out_keys(*keys)
        assert selected.out_keys == keys
        assert_equal(called(selected, data), out.select(*keys))
        selected = case.make()
        selected.select_out_keys(*keys)
        tensors = called(selected, *(data[key] for key in selected.in_keys))
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        assert all(torch.equal(x, out[key]) for x, key in zip(tensors, keys, strict=True))
        selected.reset_out_keys()
        assert selected.out_keys == loss.out_keys


# Arithmetic -----------------------------------------------------------------------------------------------------------


@check
def reduction(case: Case) -> None:
    """what `none` leaves has that `sum`, and by the number of entries that count, that `mean`"""
    data = case.data()
    none, mean, summed = (called(case.make(reduction=name), data) for name in ("none", "mean", "sum"))
    assert_equal(called(case.make(), data), mean)
    for key in case.trains:
        assert none[key].shape == (*data.shape, 1)
        counted = (none[key] != 0).sum()
        assert counted > 1
        torch.testing.assert_close(none[key].sum(), summed[key])
        torch.testing.assert_close(none[key].sum() / counted, mean[key])
    assert_equal(none.exclude(*case.trains), mean.exclude(*case.trains))
    with pytest.raises(ConfigurationError, match="reduction='avg' is not one of none, mean, sum"):
        case.make(reduction="avg")


@check
def loss_mask(case: Case) -> None:
    """masked positions count nothing, under `loss_mask_key`"""
    data = case.data()
    mask = torch.ones(*data.shape, 1, dtype=torch.bool)
    mask.view(BATCH, -1)[0, -1] = False
    none = called(case.make(reduction="none"), data)
    masked = data.clone().set(("my", "mask"), mask)
    loss = case.make(reduction="sum")
    loss.loss_mask_key = ("my", "mask")
    out = called(loss, masked)
    for key in case.trains:
        assert not torch.equal(out[key], none[key].sum())
    every = case.make(reduction="none")
    every.loss_mask_key = ("my", "mask")
    left = called(every, masked)
    for key in case.trains:
        assert (left[key][~mask] == 0).all()
        torch.testing.assert_close(left[key].sum(), out[key])
    ignored = case.make()
    ignored.loss_mask_key = None
    assert_equal(called(ignored, data.clone().set(("collector", "mask"), mask)), called(case.make(), data))


@check
def vmap(case: Case) -> None:
    """`torch.vmap` over a stack of batches is the loop over them"""
    batches = [case.data(), case.data()]
    for entry in batches[1].values(True, True):
        if entry.is_floating_point():
            entry.mul_(0.7)
    # What a loss keeps between calls would be one state of two.
    loss = case.make(**({"normalize_returns": False} if "normalize_returns" in parameters(case.loss) else {}))
    mapped = torch.vmap(lambda data: called(loss, data), randomness="same")(torch.stack(batches))
    for k, batch in enumerate(batches):
        assert_equal(mapped[k], called(loss, batch), rtol=1e-4, atol=1e-6)


@check
def deactivate_vmap(case: Case) -> None:
    """a loop over the ensemble equals evaluating all members together, gradients alike"""
    results = []
    for deactivated in (False, True):
        loss = case.make(deactivate_vmap=deactivated)
        out = called(loss, case.data())
        results.append([*out.values(), *torch.autograd.grad(total(out), list(loss.parameters()))])
    for together, looped in zip(*results, strict=True):
        torch.testing.assert_close(looped, together)


@check
def gradients(case: Case) -> None:
    """each term trains the parameters that it should and no others, nothing that is only read, no input but its own"""
    loss, data = case.make(), case.data()
    keys = [key for key in loss.in_keys if data[key].is_floating_point()]
    for key in keys:
        data[key] = data[key].clone().requires_grad_()
    out = called(loss, data)
    named = {name.split("_params.", 1)[1]: p for name, p in loss.named_parameters()}
    assert named
    trained = set()
    for key, prefixes in case.trains.items():
        found = torch.autograd.grad(out[key], list(named.values()), allow_unused=True, retain_graph=True)
        for (name, _), gradient in zip(named.items(), found, strict=True):
            assert (gradient is not None and gradient.abs().max() > 0) == name.startswith(prefixes), (key, name)
            trained |= {name} if name.startswith(prefixes) else set()
    assert trained == set(named), "every parameter is trained by a term"
    total(out).backward()
    for network in case.reads(loss):
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
        assert not {id(p) for p in network.parameters()} & {id(p) for p in loss.parameters()}
    for key in keys:
        assert (data[key].grad is not None) == (key in case.differentiable_inputs), key


@check
def separate_losses(case: Case) -> None:
    """always as `separate_losses=True`: what it shares with networks that it reads is trained by its own part alone"""
    if case.loss is PWMActorLoss:
        shared_trunk_is_trained_by_the_policy_alone(case)
        return
    data = case.data()  # latents that an encoder gave
    encoder = nn.Linear(data["latent"].shape[-1], data["latent"].shape[-1])
    data["latent"] = encoder(data["latent"])
    total(called(case.make(), data)).backward()
    assert all(p.grad is None for p in encoder.parameters())


def shared_trunk_is_trained_by_the_policy_alone(case: Case) -> None:
    """A policy and a value that read one layer, and the same two with a layer each."""
    results, data = [], case.data()
    for shared in (True, False):
        loss = case.make()
        torch.manual_seed(5)
        trunk, head, value = nn.Linear(D, 12), nn.Linear(12, 2 * A), nn.Linear(12, 1)
        policy = TensorDictModule(
            nn.Sequential(trunk, nn.Tanh(), head, NormalParamExtractor()), in_keys=["latent"], out_keys=["loc", "scale"]
        )
        other = trunk if shared else deepcopy(trunk)
        values = TensorDictModule(nn.Sequential(other, nn.Tanh(), value), in_keys=["latent"], out_keys=["state_value"])
        loss = PWMActorLoss(policy, loss.world_model, values, horizon=HORIZON, action_mask=loss.action_mask)
        assert {id(p) for p in loss.parameters()} == {id(p) for p in policy.parameters()}
        out = called(loss, data)
        out["loss_actor"].backward()
        assert value.weight.grad is None
        results.append([out["loss_actor"], *(p.grad for p in policy.parameters())])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart)


@check
def value_estimators(case: Case) -> None:
    """`make_value_estimator` for targets that it writes; targets of any estimator where it reads them"""
    if case.loss is PWMActorLoss:
        writes_targets_of_estimators(case)
        return
    if case.data().ndim == 1:  # targets are estimated along rollouts
        return
    loss, data = case.make(), case.data()
    next_ = TensorDict(
        latent=torch.rand_like(data["latent"]),
        reward=torch.randn_like(data["value_target"]),
        done=torch.zeros_like(data["value_target"], dtype=torch.bool),
        batch_size=data.batch_size,
    )
    estimator = TDLambdaEstimator(gamma=0.9, lmbda=0.8, value_network=value_module(loss.critics))
    read = estimator(data.exclude("value_target").set("next", next_))
    with torch.no_grad():
        after = loss.critics.value(next_["latent"])
    expected = td_lambda_return_estimate(0.9, 0.8, after, next_["reward"], next_["done"], time_dim=1)
    torch.testing.assert_close(read["value_target"], expected)
    assert called(loss, read)["loss_value"] > 0


def writes_targets_of_estimators(case: Case) -> None:
    data = case.data()

    def targets(*args: object, **kwargs: object) -> torch.Tensor:
        loss = case.make(gamma=0.9, lmbda=0.8)
        if args:
            assert loss.make_value_estimator(*args, **kwargs) is loss
        assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.actor_network.parameters()}
        torch.manual_seed(3)
        return loss.rollout_and_loss(data)[1]["value_target"]

    default = targets()
    torch.testing.assert_close(targets(ValueEstimators.TDLambda), default)
    torch.testing.assert_close(targets(None), default)
    lambda_0 = targets(ValueEstimators.TDLambda, lmbda=0.0)
    torch.testing.assert_close(targets(ValueEstimators.TD0), lambda_0)
    torch.testing.assert_close(targets(ValueEstimators.TD1), targets(ValueEstimators.TDLambda, lmbda=1.0))
    torch.testing.assert_close(targets(TD0Estimator, gamma=0.9, value_network=None), lambda_0)
    assert not torch.equal(default, lambda_0)
    other = value_module(randomized(CriticEnsemble(D, [10]), seed=8))
    foreign = targets(TD0Estimator(gamma=0.9, value_network=other))
    assert not torch.equal(foreign, lambda_0), "an estimator's own network gives the values"
    with pytest.raises(NotImplementedError, match="GAE"):
        case.make().make_value_estimator(ValueEstimators.GAE)
    nested = case.make(nested=True)
    nested.make_value_estimator(ValueEstimators.TD0)
    nested.set_keys(value_target="elsewhere")
    assert nested.value_estimator.tensor_keys.value_target == "elsewhere"
    assert "elsewhere" in nested.rollout_and_loss(case.nested_data())[1].keys()


# Parameters -----------------------------------------------------------------------------------------------------------


@check
def state_dict(case: Case) -> None:
    """round trip, strict, into a loss with other parameters"""
    first, second, data = case.make(), scrambled(case.make()), case.data()
    called(first, data)  # statistics, where there are some
    state = {key: value.clone() for key, value in first.state_dict().items()}
    expected = called(first, data)
    assert any(not torch.equal(value, second.state_dict()[key]) for key, value in state.items())
    second.load_state_dict(state, strict=True)
    assert_equal(called(second, data), expected)


@check
def reset_parameters_recursive(case: Case) -> None:
    """initialises its own parameters anew, targets alike, and no others"""
    options = {name: True for name in ("delay_target", "delay_value") if name in parameters(case.loss)}
    loss = case.make(**options)
    names = {name for name, _ in loss.named_parameters()}
    state = loss.state_dict()
    tensors = {key: value for key, value in state.items() if key in names or key.removeprefix("target_") in names}
    read = [p.clone() for network in case.reads(loss) for p in network.parameters()]
    with torch.no_grad():
        for value in tensors.values():
            value.add_(1000)
    loss.reset_parameters_recursive()
    for key, value in tensors.items():
        assert value.abs().max() < 10, key
        assert torch.equal(value, state[key.removeprefix("target_")])
    assert all(
        torch.equal(a, b) for a, b in zip(read, [p for n in case.reads(loss) for p in n.parameters()], strict=True)
    )
    with pytest.warns(UserWarning, match="No target network updater") if options else warnings.catch_warnings():
        total(called(loss, case.data())).backward()


@check
def target_parameters(case: Case) -> None:
    """parameters that follow, by `SoftUpdate` and `HardUpdate`; they are computed with and get no gradient"""
    option = {PWMModelLoss: "delay_target", PWMActorLoss: "delay_value"}[case.loss]
    data = case.data()
    expected = called(case.make(), data)
    with pytest.warns(UserWarning, match="No target network updater"):
        called(case.make(**{option: True}), data)
    for make_updater, distance in (
        (lambda loss: SoftUpdate(loss, tau=0.25), 0.75),
        (lambda loss: HardUpdate(loss, value_network_update_interval=0), 0.0),
    ):
        loss = case.make(**{option: True})
        updater = make_updater(loss)
        assert_equal(called(deepcopy(loss), data), expected)
        (name,) = [name for name in loss._modules if name.startswith("target_")]
        target, source = getattr(loss, name), getattr(loss, name.removeprefix("target_"))
        assert not {id(p) for p in target.values(True, True)} & {id(p) for p in loss.parameters()}
        assert any(key.startswith(name) for key in loss.state_dict())
        with torch.no_grad():
            for p in source.values(True, True):
                if isinstance(p, nn.Parameter):
                    p.add_(1.0)
        moved = called(deepcopy(loss), data)
        updater.step()
        for key, value in source.items(True, True):
            if isinstance(value, nn.Parameter):
                torch.testing.assert_close(value - target[key], torch.full_like(value, distance), rtol=0, atol=1e-5)
        followed = called(loss, data)
        assert not torch.equal(total(moved), total(followed)), "the loss computes with them"
        total(followed).backward()
        assert all(t.grad is None for t in target.values(True, True))
    with pytest.raises(RuntimeError, match="Did not find any target parameters"):
        SoftUpdate(case.make(), tau=0.1)


# Moves and copies -----------------------------------------------------------------------------------------------------


def doubled(data: TensorDictBase) -> TensorDictBase:
    return data.apply(lambda x: x.double() if x.is_floating_point() else x)


@check
def moves(case: Case) -> None:
    """`.double()`: everything goes along that it computes with, and its networks stay one with it"""
    loss, data = case.make(), doubled(case.data())
    expected = called(case.make(), case.data())
    ids = {id(p) for p in loss.parameters()}
    loss.double()
    out = called(loss, data)
    assert all(value.dtype == torch.float64 for value in out.select(*case.trains).values())
    if not hasattr(loss, "draw_noise"):  # of which other numbers are drawn in another type
        assert_equal(out.float(), expected, rtol=1e-3, atol=1e-4)
    assert {id(p) for p in loss.parameters()} == ids, "optimizers keep their parameters"
    for name, network in own_networks(loss).items():
        tensors = getattr(loss, f"{name}_params").values(True, True)
        theirs = [*network.parameters(), *network.buffers()]
        assert {t.data_ptr() for t in theirs} >= {t.data_ptr() for t in tensors}
        assert all(t.dtype == torch.float64 for t in theirs if t.is_floating_point())
    total(out).backward()


@check
def devices(case: Case) -> None:
    """`.to("cuda")`: everything goes along (`TensorDictParams` cannot be moved to `meta`)"""
    loss = case.make().to("cuda")
    out = called(loss, case.data().to("cuda"))
    assert {value.device.type for value in out.values()} == {"cuda"}
    for network in [*own_networks(loss).values(), *case.reads(loss)]:
        assert {t.device.type for t in [*network.parameters(), *network.buffers()]} == {"cuda"}
    total(out).backward()


@check
def copies(case: Case) -> None:
    """pickled and deep-copied, compiled losses too; a copy is independent"""
    data = case.data()
    expected = called(case.make(), data)
    for copy in (lambda loss: pickle.loads(pickle.dumps(loss)), deepcopy):
        loss = case.make()
        other = copy(loss)
        assert_equal(called(other, data), expected)
        scrambled(other)
        assert_equal(called(loss, data), expected)
        named = dict(loss.named_parameters())
        assert [name for name, _ in other.named_parameters()] == list(named)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in named.values()}
    if "compile" in parameters(case.loss):
        pickle.loads(pickle.dumps(case.make(compile=True)))
        deepcopy(case.make(compile=True))


@check
def compiles(case: Case) -> None:
    """`torch.compile(fullgraph=True)` of the forward equals eager, gradients alike"""
    data, results = case.data(), []
    for compiled in (False, True):
        torch._dynamo.reset()
        loss = case.make()
        call = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
        out = called(call, data)
        results.append((out, torch.autograd.grad(total(out), list(loss.parameters()), allow_unused=True)))
    (expected, eager), (out, ours) = results
    assert_equal(out, expected, rtol=1e-4, atol=1e-5)
    for x, y in zip(ours, eager, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@check
def warns_of_nothing(case: Case) -> None:
    """building, calling and back-propagating give no warning"""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total(called(case.make(), case.data())).backward()
