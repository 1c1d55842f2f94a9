"""The imagination core: a pure function that compiles as one graph."""

from __future__ import annotations

import pytest
import torch
from objective_cases import FLOW, A, B, D, H, Networks
from torch import Tensor

from pwm_torchrl.modules import WorldModel
from pwm_torchrl.objectives import imagine, rollout_return


def test_against_a_loop() -> None:
    n = Networks(termination=True)
    start, noise = n.start()["latent"], torch.randn(H, B, A)
    out = imagine(n.model, n.actor.act, start, H, noise)
    z = start
    for t in range(H):
        a = n.actor.act(z, noise[t])
        assert torch.equal(out.latent[t], z)
        assert torch.equal(out.action[t], a)
        z, r, end = n.model(z, a)
        assert torch.equal(out.reward[t], r)
        assert torch.equal(out.terminated[t], end)
    assert torch.equal(out.latent[H], z)
    assert out.latent.shape == (H + 1, B, D)
    assert out.action.shape == (H, B, A)
    assert out.reward.shape == out.terminated.shape == (H, B, 1)


def test_noise_is_the_only_source_of_randomness() -> None:
    n = Networks()
    start, noise = n.start()["latent"], torch.randn(H, B, A)
    whole = imagine(n.model, n.actor.act, start, H, noise)
    parts = [imagine(n.model, n.actor.act, start[i : i + 2], H, noise[:, i : i + 2]) for i in range(0, B, 2)]
    for name in ("latent", "action", "reward", "terminated"):
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], 1))
    assert torch.equal(imagine(n.model, n.actor.act, start, H).action[0], n.actor.act(start))


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_in_double_precision(detach: bool) -> None:
    """Of J to the actions' perturbations: through dynamics, reward, and, when attached, the policy's input."""
    n = Networks(dtype=torch.float64, reward_head="two_hot", dynamics=FLOW)
    start, noise = n.start(2)["latent"], torch.randn(3, 2, A, dtype=torch.float64)

    def returns(noise: Tensor) -> Tensor:
        out = imagine(n.model, n.actor.act, start, 3, noise, detach_policy_input=False)
        return rollout_return(out.reward, out.terminated, n.critics.value(out.latent[-1]), 0.9)

    assert torch.autograd.gradcheck(returns, noise.requires_grad_())
    out = imagine(n.model, n.actor.act, start, 3, noise, detach_policy_input=detach)
    # the last action depends on the first noise through the policy's input only if that is attached
    gradient = torch.autograd.grad(out.action[-1].sum(), noise)[0]
    assert (gradient[0].abs().max() > 0) != detach
    assert gradient[-1].abs().max() > 0


def test_any_step_function_fits() -> None:
    """A differentiable environment: a point mass."""

    def step(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + 0.1 * a
        return x, -x.square().sum(-1, keepdim=True), x.abs().amax(-1, keepdim=True) > 2

    start, force = torch.ones(B, A), torch.zeros(A, requires_grad=True)
    out = imagine(step, lambda x, noise: force.expand_as(x), start, H)
    gradient = torch.autograd.grad(rollout_return(out.reward, out.terminated, torch.zeros(B, 1), 1.0).mean(), force)[0]
    torch.testing.assert_close(gradient, torch.full((A,), -2 * sum(0.1 * t for t in range(1, H + 1))))


class Objective(torch.nn.Module):
    """Rollout, values and return in one function."""

    def __init__(self, n: Networks) -> None:
        super().__init__()
        self.n, self.model, self.actor = n, n.model, n.actor

    def forward(self, start: Tensor, noise: Tensor, task: Tensor | None) -> Tensor:
        model: WorldModel = self.model
        out = imagine(
            lambda z, a: model(z, a, task), lambda z, e: model.mask_action(self.actor.act(z, e), task), start, H, noise
        )
        return rollout_return(out.reward, out.terminated, self.n.critics.value(out.latent[-1]), 0.99)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reward_head": "two_hot", "termination": True, "tasks": True},
        {"dynamics": {**FLOW, "condition_on_step_size": True, "condition_on_start": True}},
        {"dynamics": {**FLOW, "parameterization": "tangent", "solver": "euler"}, "normalize_observations": True},
    ],
    ids=["mlp", "multi-task", "flow", "tangent"],
)
def test_compiles_as_one_graph_and_equals_eager(options: dict) -> None:
    torch._dynamo.reset()
    n = Networks(**options)
    eager, data, noise = Objective(n), n.start(), torch.randn(H, B, A)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    results = []
    for f in (eager, compiled):
        j = f(data["latent"], noise, data.get("task"))
        results.append([j, *torch.autograd.grad(j.mean(), list(n.actor.parameters()))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
