"""The entropy of the policy beside its return."""

from __future__ import annotations

import pytest
import torch
from objective_cases import Networks, gradients
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from pwm_torchrl.objectives.imagination import squashed_entropy

WEIGHT = 0.1


def test_is_that_of_the_squashed_distribution_to_a_constant():
    """Along the sample, -log π(a) of torch's distribution differs by what does not depend on the parameters."""
    loc = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
    scale = torch.linspace(0.2, 1.5, 7, dtype=torch.float64).requires_grad_()
    noise = torch.randn(7, dtype=torch.float64)
    policy = TransformedDistribution(Normal(loc, scale), [TanhTransform(cache_size=1)])
    action = torch.tanh(loc + scale * noise)
    found = torch.autograd.grad(squashed_entropy(loc, scale, noise).sum(), (loc, scale))
    expected = torch.autograd.grad(-policy.log_prob(action).sum(), (loc, scale))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_brings_back_what_has_saturated():
    loc = torch.tensor([-30.0, -12.0, 12.0, 30.0], requires_grad=True)
    entropy = squashed_entropy(loc, torch.full((4,), 0.3), torch.zeros(4))
    (gradient,) = torch.autograd.grad(entropy.sum(), loc)
    assert entropy.isfinite().all()
    torch.testing.assert_close(gradient, torch.tensor([2.0, 2.0, -2.0, -2.0]))


@pytest.mark.parametrize("normalize", [False, True], ids=["by horizon", "by deviation"])
@pytest.mark.parametrize("tasks", [False, True], ids=["single", "tasks"])
def test_gradient_is_that_of_the_scaled_return_and_the_entropy(tasks, normalize):
    n = Networks(tasks, torch.float64, termination=True)
    data = n.start()
    plain, loss = (n.loss(normalize_returns=normalize, entropy_weight=weight) for weight in (0.0, WEIGHT))
    noise = plain.draw_noise(data["latent"])
    task = data.get("task") if tasks else None

    def parts(loss):
        rollout, value = loss.imagine(data["latent"], task, noise)
        bonus = loss.entropy_bonus(rollout, noise, task)
        return rollout, loss.objective(rollout, value, bonus)[0]

    rollout, without = parts(plain)
    _, beside = parts(loss)
    torch.testing.assert_close(beside, without)  # the entropy has no part in the value

    alive, entropy = 1.0, 0.0
    for t in range(len(noise)):
        z = rollout.latent[t].detach()
        each = squashed_entropy(n.actor.net(z), n.actor.log_std.clamp(min=-1.427).exp(), noise[t])
        if task is not None:
            each = each * n.model.task.mask(task)
        entropy = entropy + alive * each.sum(-1, keepdim=True) / len(noise)
        alive = alive * (~rollout.terminated[t]).double()
    # The bonus is scaled by the deviation that was known before J entered it: 1 for the first batch.
    scale = 1.0 if not normalize else 1.0 / loss.return_statistics.var.add(1e-5).sqrt().squeeze()
    expected = without - WEIGHT * scale * entropy.mean() * (1.0 if not normalize else (1 + 1e-5) ** 0.5)
    for ours, theirs in zip(gradients(beside, n.actor), gradients(expected, n.actor), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalize", [False, True])
def test_in_parts_as_at_once(normalize):
    n = Networks(True, torch.float64)
    data = n.start()
    found = []
    for size in (None, 2):
        loss = n.loss(normalize_returns=normalize, entropy_weight=WEIGHT)
        torch.manual_seed(1)
        loss.backward(data, size)
        found.append([p.grad.clone() for p in n.actor.parameters() if p.grad is not None])
        n.actor.zero_grad()
    torch.manual_seed(1)
    loss = n.loss(normalize_returns=normalize, entropy_weight=WEIGHT)
    found.append([g for g in gradients(loss(data)["loss_actor"], n.actor) if g is not None])
    for whole, parts, forward in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(whole, forward, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"entropy_weight": -0.1}, {"entropy_weight": 0.1, "deterministic": True}])
def test_refused(options):
    with pytest.raises(ValueError, match="must not be negative, and 0 for a deterministic policy"):
        Networks().loss(**options)
