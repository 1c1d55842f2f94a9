"""The soft actor's loss: its value written out, its gradients, its parts, its temperature."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from pwm_torchrl.modules import Actor, CriticEnsemble, WorldModelSpec, make_world_model
from pwm_torchrl.objectives import SoftActorLoss
from pwm_torchrl.objectives.soft_actor_loss import squashed_log_prob

GAMMA, ACTIONS = 0.9, 2


def made(horizon: int = 3, *, termination: bool = True, scaled: bool = True, **options: object) -> SoftActorLoss:
    """A loss over random networks in float64."""
    torch.manual_seed(0)
    spec = WorldModelSpec(3, ACTIONS, 16, [12], [12], dynamics={"kind": "residual"}, termination=termination)
    model = make_world_model(spec)
    actor = Actor(16, ACTIONS, [12], state_std=True, temperature=0.3)
    critics = CriticEnsemble(16, [12], 2, action_dim=ACTIONS, scaled=scaled)
    with torch.no_grad():
        for p in (*model.parameters(), *actor.net.parameters(), *critics.parameters()):
            p.add_(torch.randn_like(p), alpha=0.3)
    for network in (model, actor, critics):
        network.double()
    if scaled:
        critics.rescale(torch.tensor([2.5], dtype=torch.float64))
    return SoftActorLoss(actor, model, critics, horizon=horizon, gamma=GAMMA, **options)


def start(rows: int = 6) -> TensorDict:
    return TensorDict(latent=torch.rand(rows, 16, dtype=torch.float64).softmax(-1), batch_size=[rows])


@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("termination", [True, False])
def test_the_return_is_the_sum_in_its_docstring(horizon: int, termination: bool) -> None:
    loss, z = made(horizon, termination=termination), start()["latent"]
    model, actor, critics = loss.world_model, loss.actor, loss.critics
    noise = loss.draw_noise(z)
    assert noise.shape == (horizon + 1, 6, ACTIONS)
    rollout = loss.imagine(z, noise)
    weight = 0.3 * 2.5
    expected, alive = torch.zeros(6, 1, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    for t in range(horizon + 1):
        mean, std = actor(z)
        action = torch.tanh(mean + std * noise[t])
        normal = torch.distributions.Normal(mean, std).log_prob(mean + std * noise[t])
        entropy = -(normal - (1 - action.square()).log()).sum(-1, keepdim=True)
        if t == horizon:
            expected = expected + GAMMA**t * alive * (critics(z, action).amin(0) + weight * entropy)
        else:
            following, logits, end = model.predict(z, action)
            expected = expected + GAMMA**t * alive * (model.reward.decode(logits) + weight * entropy)
            z = following
            alive = alive * (1 - end.sigmoid()) if end is not None else alive
    torch.testing.assert_close(rollout.objective, expected)
    torch.testing.assert_close(rollout.alive, alive)
    assert (alive < 1).all() == (termination and horizon > 0)


def test_log_prob_is_that_of_a_squashed_gaussian_far_out_too() -> None:
    mean, std = torch.tensor([[0.3, 12.0]]), torch.tensor([[0.5, 0.1]])
    noise = torch.tensor([[1.0, -1.0]])
    u = (mean + std * noise).double()
    expected = (
        torch.distributions.Normal(mean.double(), std.double()).log_prob(u)
        - 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    ).sum(-1, keepdim=True)
    torch.testing.assert_close(squashed_log_prob(mean + std * noise, std, noise).double(), expected, rtol=1e-4, atol=0)


def test_only_the_actor_gets_gradient_and_all_of_it() -> None:
    loss = made()
    loss.backward(start())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.actor.parameters())
    assert all(p.grad is None for p in (*loss.world_model.parameters(), *loss.critics.parameters()))


def test_the_gradient_goes_through_the_model() -> None:
    """With critics that know nothing, only imagined rewards move the policy's mean."""
    loss = made(2, termination=False)
    with torch.no_grad():
        for p in list(loss.critics.params)[-2:]:
            p.zero_()
    first, second, last = loss.action_gradients(start()["latent"])
    assert first.abs().max() > 0
    assert second.abs().max() > 0
    assert not last.any()


@pytest.mark.parametrize("size", [1, 4, 6])
def test_parts_add_up_to_the_whole(size: int) -> None:
    data = start()
    results = []
    for micro_batch in (None, size):
        loss = made()
        torch.manual_seed(3)
        metrics, _ = loss.backward(data, micro_batch)
        results.append(({name: p.grad for name, p in loss.actor.named_parameters()}, metrics))
    (whole, values), (parts, also) = results
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient)
    torch.testing.assert_close(also["loss_actor"], values["loss_actor"])
    assert set(values.keys()) == set(made().out_keys)


@pytest.mark.parametrize(("target", "sign"), [(-50.0, 1), (50.0, -1)])
def test_the_temperature_falls_where_there_is_more_entropy_than_wanted(target: float, sign: int) -> None:
    loss = made(target_entropy=target)
    loss.backward(start())
    assert loss.actor.log_temperature.grad.sign() == sign


def test_the_unit_of_rewards_cancels() -> None:
    """Values, rewards and their unit ten times as large leave the policy's gradient what it is."""
    gradients = []
    for factor in (1.0, 10.0):
        loss = made(0)
        loss.critics.scale.mul_(factor)  # values scale with it
        torch.manual_seed(1)
        loss.backward(start())
        gradients.append(loss.actor.net[-1].weight.grad)
    torch.testing.assert_close(*gradients)


def test_refuses_what_has_no_temperature_no_actions_or_a_negative_horizon() -> None:
    model = make_world_model(WorldModelSpec(3, 1, 16, [8], [8]))
    actor, critics = Actor(16, 1, [8], temperature=0.1), CriticEnsemble(16, [8], action_dim=1)
    with pytest.raises(ValueError, match="temperature=None"):
        SoftActorLoss(Actor(16, 1, [8]), model, critics)
    with pytest.raises(ValueError, match="action_dim=0"):
        SoftActorLoss(actor, model, CriticEnsemble(16, [8]))
    with pytest.raises(ValueError, match="horizon=-1"):
        SoftActorLoss(actor, model, critics, horizon=-1)
