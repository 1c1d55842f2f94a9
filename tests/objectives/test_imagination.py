"""The imagination core: a pure function that compiles as one graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import FLOW, A, B, D, H, Networks, gradients
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from pwm_torchrl.modules import WorldModel
from pwm_torchrl.objectives import ensemble_value_loss, imagine, rollout_return, td_lambda_targets
from pwm_torchrl.objectives.imagination import alive_before, squashed_entropy


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


# The entropy of the policy --------------------------------------------------------------------------------------------


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


# Returns and TD(λ) targets --------------------------------------------------------------------------------------------


GAMMA, LMBDA = 0.9, 0.8


def rollout(horizon: int, batch: int = 4, ends: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(horizon, batch, 1, generator=g, dtype=torch.float64)
    value = torch.randn(horizon, batch, 1, generator=g, dtype=torch.float64)
    return reward, value, torch.rand(horizon, batch, 1, generator=g) < ends


class TestRolloutReturn:
    @given(horizon=st.integers(1, 8), ends=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 999))
    def test_against_a_loop(self, horizon: int, ends: float, seed: int) -> None:
        reward, value, terminated = rollout(horizon, ends=ends, seed=seed)
        actual = rollout_return(reward, terminated, value[-1], GAMMA)
        for b in range(4):
            expected, alive = 0.0, True
            for t in range(horizon):
                if alive:
                    expected += GAMMA**t * reward[t, b, 0].item()
                    alive = not terminated[t, b, 0]
            expected += GAMMA**horizon * value[-1, b, 0].item() * alive
            assert actual[b, 0].item() == pytest.approx(expected)

    def test_alive_before(self) -> None:
        terminated = torch.tensor([[False], [True], [False], [True]]).unsqueeze(-1)
        assert alive_before(terminated).flatten().tolist() == [1, 1, 0, 0, 0]

    @pytest.mark.parametrize(
        ("reward", "terminated", "value"),
        [
            ((5, 4), (5, 4), (4,)),
            ((5, 4, 1), (5, 4), (4, 1)),
            ((5, 4, 1), (5, 4, 1), (4,)),
            ((5, 4, 1), (5, 1, 1), (4, 1)),
            ((5, 4, 1), (5, 4, 1), (1, 1)),
            ((5, 4, 2), (5, 4, 2), (4, 2)),
        ],
    )
    def test_refuses_to_broadcast(self, reward: tuple, terminated: tuple, value: tuple) -> None:
        with pytest.raises(ValueError, match=r"nothing is broadcast"):
            rollout_return(torch.zeros(reward), torch.zeros(terminated, dtype=torch.bool), torch.zeros(value), GAMMA)

    def test_gradcheck(self) -> None:
        reward, value, terminated = rollout(4, ends=0.2)
        inputs = (reward.requires_grad_(), value[-1].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda r, v: rollout_return(r, terminated, v, GAMMA), inputs)


class TestTargets:
    def expected(self, reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """G_t = r_t + γ (1 − terminated_t) [(1 − λ) V_{t+1} + λ G_{t+1}]; G_{t+1} = V_{t+1} where done, and last."""
        targets, last = [], value[-1]
        for r, v, end, stop in zip(*(x.flip(0) for x in (reward, value, terminated, done)), strict=True):
            last = torch.where(stop, v, last)
            last = r + GAMMA * (~end).double() * ((1 - LMBDA) * v + LMBDA * last)
            targets.append(last)
        return torch.stack(targets[::-1])

    @given(horizon=st.integers(1, 8), ends=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 999))
    def test_against_a_loop(self, horizon: int, ends: float, seed: int) -> None:
        reward, value, terminated = rollout(horizon, ends=ends, seed=seed)
        actual = td_lambda_targets(reward, value, terminated, GAMMA, LMBDA)
        torch.testing.assert_close(actual, self.expected(reward, value, terminated, terminated))

    @given(seed=st.integers(0, 999))
    def test_truncation_bootstraps_and_stops(self, seed: int) -> None:
        reward, value, done = rollout(6, ends=0.3, seed=seed)
        terminated = done & (torch.rand(done.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
        actual = td_lambda_targets(reward, value, terminated, GAMMA, LMBDA, done=done)
        torch.testing.assert_close(actual, self.expected(reward, value, terminated, done))

    def test_end_points_of_lambda(self) -> None:
        reward, value, terminated = rollout(6)
        one_step = reward + GAMMA * value
        torch.testing.assert_close(td_lambda_targets(reward, value, terminated, GAMMA, 0.0), one_step)
        monte_carlo = td_lambda_targets(reward, value, terminated, GAMMA, 1.0)
        torch.testing.assert_close(monte_carlo[0], rollout_return(reward, terminated, value[-1], GAMMA))

    def test_carry_no_gradient(self) -> None:
        reward, value, terminated = rollout(6)
        assert not td_lambda_targets(
            reward.requires_grad_(), value.requires_grad_(), terminated, GAMMA, LMBDA
        ).requires_grad

    @pytest.mark.parametrize(
        ("reward", "value", "terminated"),
        [
            ((5, 4), (5, 4), (5, 4)),
            ((5, 4, 1), (5, 4), (5, 4, 1)),
            ((5, 4, 1), (5, 1, 1), (5, 4, 1)),
            ((5, 4, 1), (5, 4, 1), (5, 4)),
        ],
    )
    def test_refuse_to_broadcast(self, reward: tuple, value: tuple, terminated: tuple) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            td_lambda_targets(
                torch.zeros(reward), torch.zeros(value), torch.zeros(terminated, dtype=torch.bool), GAMMA, LMBDA
            )


class TestEnsembleValueLoss:
    def test_elementwise(self) -> None:
        values, target = torch.randn(3, 5, 4, 1), torch.randn(5, 4, 1)
        loss = ensemble_value_loss(values, target)
        assert loss.shape == (3, 5, 4, 1)
        torch.testing.assert_close(loss[1, 2, 3], (values[1, 2, 3] - target[2, 3]) ** 2)

    @pytest.mark.parametrize("target", [(5,), (1,), (5, 5), (1, 1), (3, 5, 1), (4, 1)])
    def test_refuses_to_broadcast(self, target: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            ensemble_value_loss(torch.zeros(3, 5, 1), torch.zeros(target))

    def test_flat_batch_of_one(self) -> None:
        with pytest.raises(ValueError, match="nothing is broadcast"):
            ensemble_value_loss(torch.zeros(3, 1, 1), torch.zeros(1))

    def test_gradcheck(self) -> None:
        values, target = torch.randn(3, 4, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda v: ensemble_value_loss(v, target), values.requires_grad_())
        assert not ensemble_value_loss(values.detach(), target.requires_grad_()).requires_grad
