"""The losses whose conformity is checked, each over small networks, with the data that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from objective_cases import FLOW, D, Networks, randomized, slice_data, world_model
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torchrl.objectives.common import LossModule

from pwm_torchrl.modules import CriticEnsemble, value_module, world_model_module
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss

BATCH, HORIZON = 4, 2
EVERYTHING = {
    "dynamics": {**FLOW, "condition_on_step_size": True},
    "termination": True,
    "reward_head": "two_hot",
    "normalize_observations": True,
}
#: Every configurable key of each loss, renamed to a nested one.
NESTED: dict[type[LossModule], dict[str, NestedKey]] = {
    PWMModelLoss: {
        "observation": ("a", "o"), "action": ("a", "b", "act"), "reward": ("r", "x"), "done": ("d", "y"),
        "terminated": ("e", "z"), "task": ("i", "task"),
    },
    PWMActorLoss: {
        "latent": ("s", "z"), "action": ("s", "a"), "reward": ("s", "r"), "terminated": ("s", "end"),
        "state_value": ("v", "min"), "value_target": ("v", "target"), "loc": ("p", "m"), "scale": ("p", "std"),
        "task": ("i", "task"),
    },
    PWMValueLoss: {"latent": ("s", "z"), "action": ("s", "a"), "value_target": ("t", "v")},
}  # fmt: skip
ALL = ("",)  # a prefix of every name
STEP = ("encoder", "dynamics", "task")  # what a rolled-out latent depends on


@dataclass(frozen=True)
class Case:
    """One loss over one kind of networks.

    Two calls of :attr:`make` give two losses with equal parameters that share nothing.
    """

    loss: type[LossModule]
    name: str
    make: Callable[..., LossModule]  # keyword arguments are the loss's; nested=True: everything under NESTED keys
    data: Callable[[], TensorDict]
    #: by loss key, the prefixes of the names of the parameters that it trains
    trains: dict[str, tuple[str, ...]]
    #: input entries that gradients may reach
    differentiable_inputs: tuple[NestedKey, ...] = ()
    #: whether this is the case that is compiled, which takes long: the one that has most in it
    compiled: bool = False
    #: networks that the loss reads and does not train
    reads: Callable[[LossModule], list[nn.Module]] = lambda loss: []

    def __str__(self) -> str:
        return f"{self.loss.__name__}-{self.name}"

    @property
    def keys(self) -> dict[str, NestedKey]:
        """New names for all configurable keys."""
        return NESTED[self.loss]

    def nested_data(self) -> TensorDict:
        """The data under the nested keys."""
        data, keys = self.data(), self.loss.default_keys()
        nested = TensorDict({}, data.batch_size)
        for name, new in self.keys.items():
            for prefix in ((), ("next",)):
                value = data.get((*prefix, getattr(keys, name)), None)
                if value is not None:
                    nested[(*prefix, *new)] = value
        return nested


def model_case(name: str, tasks: bool, trains: dict[str, tuple[str, ...]], options: dict, **model: object) -> Case:
    def make(nested: bool = False, **kwargs: object) -> PWMModelLoss:
        network = world_model(tasks, **model)
        statistics = network.observation_statistics
        if statistics is not None:
            shape, generator = (50, *statistics.mean.shape), torch.Generator().manual_seed(1)
            statistics.update(1 + 2 * torch.randn(shape, generator=generator))
        loss = PWMModelLoss(network, **{**options, **kwargs})
        if nested:
            loss.set_keys(**NESTED[PWMModelLoss])
        return loss

    def data() -> TensorDict:
        torch.manual_seed(1)
        slices = slice_data(BATCH, HORIZON, tasks)
        slices["next", "done"][1, 0] = True
        return slices

    return Case(PWMModelLoss, name, make, data, trains, ("observation", "action"), compiled=tasks)


def actor_case(name: str, tasks: bool, options: dict, **model: object) -> Case:
    def make(nested: bool = False, **kwargs: object) -> PWMActorLoss:
        n = Networks(tasks, **model)
        if n.model.termination is not None:
            n.model.termination.threshold = 0.66  # some rollouts end, others do not
        kwargs = {"horizon": HORIZON, **options, **kwargs}
        if not nested:
            return n.loss(**kwargs)
        k = NESTED[PWMActorLoss]
        loss = PWMActorLoss(
            TensorDictModule(n.actor, in_keys=[k["latent"]], out_keys=[k["loc"], k["scale"]]),
            world_model_module(
                n.model,
                latent=k["latent"],
                action=k["action"],
                next_latent=("next", *k["latent"]),
                reward=("next", *k["reward"]),
                terminated=("next", *k["terminated"]),
                task=k["task"] if tasks else None,
            ),
            value_module(n.critics, latent=k["latent"], state_value=k["state_value"]),
            action_mask=n.model.task.action_mask if tasks else None,
            **kwargs,
        )
        loss.set_keys(**k)
        return loss

    def data() -> TensorDict:
        torch.manual_seed(1)
        return Networks(tasks).start(BATCH)

    def reads(loss: PWMActorLoss) -> list[nn.Module]:
        return [loss.world_model, loss.value_network]

    return Case(PWMActorLoss, name, make, data, {"loss_actor": ALL}, reads=reads, compiled=tasks)


def value_case(name: str, *size: int) -> Case:
    def make(nested: bool = False, **kwargs: object) -> PWMValueLoss:
        loss = PWMValueLoss(randomized(CriticEnsemble(D, [10]), seed=2), **kwargs)
        if nested:
            loss.set_keys(**NESTED[PWMValueLoss])
        return loss

    def data() -> TensorDict:
        torch.manual_seed(1)
        return TensorDict(latent=torch.rand(*size, D), value_target=torch.randn(*size, 1), batch_size=size)

    return Case(PWMValueLoss, name, make, data, {"loss_value": ALL}, compiled=len(size) == 2)


FLOW_TERMS = {"flow_matching_weight": 0.7, "self_consistency_weight": 0.3}
CASES = [
    model_case(
        "mlp", False, {"loss_dynamics": STEP, "loss_reward": (*STEP, "reward")}, {}
    ),
    model_case(
        "flow, multi-task",
        True,
        {
            "loss_dynamics": STEP,
            "loss_reward": (*STEP, "reward"),
            "loss_termination": (*STEP, "termination"),
            "loss_flow_matching": ("dynamics", "task"),
            "loss_self_consistency": ("dynamics", "task"),
        },
        FLOW_TERMS,
        **EVERYTHING,
    ),
    actor_case("mlp", False, {}),
    actor_case("flow, multi-task", True, {"normalize_returns": True, "detach": False}, **EVERYTHING),
    value_case("states", BATCH),
    value_case("rollouts", BATCH, HORIZON),
]  # fmt: skip
LOSSES = [PWMModelLoss, PWMActorLoss, PWMValueLoss]
