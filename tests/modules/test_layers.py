"""Layers: SimNorm, NormedLinear, the two kinds of MLP; the compiled piece: equal to eager, no graph twice."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    Encoder,
    NormedLinear,
    SimNorm,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_module,
)
from pwm_torchrl.modules.layers import Piece, cat_features, init_critic_weights, normed_mlp, policy_mlp
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss


@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e8]),
    seed=st.integers(0, 99),
)
def test_simnorm_gives_points_of_the_simplex(groups: int, size: int, scale: float, seed: int) -> None:
    x = scale * torch.randn(3, groups * size, generator=torch.Generator().manual_seed(seed))
    y = SimNorm(size)(x).unflatten(-1, (groups, size))
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(3, groups))


def test_simnorm_is_a_softmax_of_neighbouring_features() -> None:
    x = torch.randn(2, 8)
    expected = torch.cat([x[:, :4].softmax(-1), x[:, 4:].softmax(-1)], -1)
    torch.testing.assert_close(SimNorm(4)(x), expected)


@pytest.mark.parametrize(("latent", "group"), [(12, 8), (16, 0), (16, -8)])
def test_simnorm_that_does_not_divide_the_latent_is_one_clear_sentence(latent: int, group: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"size\.latent_dim={latent} .*size\.simnorm_dim={group}"):
        make_world_model(WorldModelSpec(3, 1, latent, [8], [8], simnorm_dim=group))


def test_normed_linear_is_linear_layernorm_mish() -> None:
    layer, x = NormedLinear(5, 7), torch.randn(4, 5)
    expected = nn.functional.mish(nn.functional.layer_norm(x @ layer.weight.T + layer.bias, (7,)))
    torch.testing.assert_close(layer(x), expected)
    assert sorted(layer.state_dict()) == ["bias", "ln.bias", "ln.weight", "weight"]


def test_world_model_initialisation() -> None:
    net = normed_mlp(300, [400], 500, None)
    for layer in net:
        assert layer.bias.abs().max() == 0
        assert 0.018 < layer.weight.std() < 0.022
    model = make_world_model(WorldModelSpec(3, 1, 16, [8], [8], num_tasks=50, task_dim=20, action_dims=[1] * 50))
    assert 0.015 < model.task.embedding.weight.abs().max() <= 0.02
    assert model.reward.net[-1].weight.abs().max() == 0


def test_policy_mlp_is_linear_mish_layernorm_with_orthogonal_weights_in_critics() -> None:
    net = policy_mlp(6, [5, 4], 2)
    kinds = [nn.Linear, nn.Mish, nn.LayerNorm, nn.Linear, nn.Mish, nn.LayerNorm, nn.Linear]
    assert all(isinstance(layer, kind) for layer, kind in zip(net, kinds, strict=True))
    x = torch.randn(3, 6)
    one_by_one = x
    for layer in net:
        one_by_one = layer(one_by_one)
    torch.testing.assert_close(net(x), one_by_one)
    init_critic_weights(net)
    assert not net[-1].weight.any()
    weight = net[3].weight.detach()
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(4))
    assert all(m.bias.abs().max() == 0 for m in net if isinstance(m, nn.Linear))


def test_encoder_concatenates_observation_and_task() -> None:
    encoder = Encoder(3, 2, [8], 16)
    o, e = torch.randn(4, 5, 3), torch.randn(5, 2)
    together = encoder(o, e)
    assert together.shape == (4, 5, 16)
    torch.testing.assert_close(together, encoder.net(torch.cat([o, e.expand(4, 5, 2)], -1)))


def test_cat_features_skips_none_and_broadcasts_later_parts_only() -> None:
    assert cat_features(torch.zeros(2, 3, 4), None, torch.zeros(3, 1)).shape == (2, 3, 5)
    with pytest.raises(RuntimeError):
        cat_features(torch.zeros(3, 4), torch.zeros(2, 3, 1))


# The compiled piece ---------------------------------------------------------------------------------------------------


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
