"""The compiled piece: equal to eager, one graph for each kind of call, no graph twice."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_module,
)
from pwm_torchrl.modules.layers import Piece
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss

FLOW = {"kind": "flow", "substeps": 3}
KINDS = [{"kind": "mlp"}, {"kind": "residual"}, FLOW, {**FLOW, "condition_on_start": True, "time_features": 2}]


def model_of(dynamics: dict[str, object], tasks: bool = False) -> WorldModel:
    torch.manual_seed(0)
    task = {"num_tasks": 2, "task_dim": 4, "action_dims": (1, 2)} if tasks else {}
    return make_world_model(WorldModelSpec(5, 2, 16, [12, 12], [8], dynamics=dynamics, **task))


def slices(batch: int = 6, horizon: int = 3, tasks: bool = False) -> TensorDict:
    torch.manual_seed(1)
    size = [batch, horizon]
    going = torch.zeros(*size, 1, dtype=torch.bool)
    step = TensorDict(
        observation=torch.randn(*size, 5), reward=torch.randn(*size, 1), done=going, terminated=going, batch_size=size
    )
    data = TensorDict(observation=torch.randn(*size, 5), action=torch.rand(*size, 2), next=step, batch_size=size)
    if tasks:
        data["task"] = torch.tensor([0, 1] * (batch // 2)).unsqueeze(1).expand(size)
    return data


def gradients(loss: PWMModelLoss, data: TensorDict) -> list[Tensor]:
    loss.zero_grad()
    loss.backward(loss.read(data))
    return [p.grad.clone() for p in loss.parameters()]


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("dynamics", KINDS, ids=str)
def test_equals_eager(dynamics: dict[str, object], tasks: bool) -> None:
    model, data = model_of(dynamics, tasks), slices(tasks=tasks)
    loss = PWMModelLoss(model)
    eager = gradients(loss, data)
    model.dynamics.piece = Piece("aot_eager")
    for a, b in zip(gradients(loss, data), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_graph_for_each_kind_of_call_and_none_twice() -> None:
    model = model_of(FLOW)
    counter = CompileCounterWithBackend("aot_eager")
    model.dynamics.piece = Piece(counter)
    critics = CriticEnsemble(16, [8])
    actor = Actor(16, 2, [8])
    train = PWMModelLoss(model)
    act = PWMActorLoss(actor_module(actor), world_model_module(model), value_module(critics), horizon=3)
    start = TensorDict(latent=model.encode(torch.randn(4, 5)).detach(), batch_size=[4])

    def epoch() -> None:
        for _ in range(2):
            train.backward(train.read(slices()))
        act.backward(start)
        with torch.no_grad():  # what an optimizer does
            for p in (*model.parameters(), *actor.parameters()):
                p.mul_(0.99)

    epoch()
    assert counter.frame_count == 2  # the model's transitions, and imagination's
    for _ in range(3):
        epoch()
    assert counter.frame_count == 2


def test_losses_install_it_once() -> None:
    model = model_of(FLOW)
    PWMModelLoss(model, compile=True)
    first = model.dynamics.piece
    assert isinstance(first, Piece)
    PWMActorLoss(
        actor_module(Actor(16, 2, [8])),
        world_model_module(model),
        value_module(CriticEnsemble(16, [8])),
        compile=True,
    )
    assert model.dynamics.piece is first
    assert model_of(FLOW).dynamics.piece is None


def test_copies_do_not_share_what_was_compiled() -> None:
    piece = Piece("aot_eager")
    piece._compiled = lambda *arguments: torch.zeros(())
    for copy in (deepcopy(piece), pickle.loads(pickle.dumps(piece))):
        assert copy.backend == "aot_eager"
        assert copy._compiled is None
