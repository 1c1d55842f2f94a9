"""The arithmetic of the world-model loss: written out, masked, split into parts, differentiated."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import FLOW, OBS, A, randomized, slice_data, time_major, world_model
from torch import Tensor
from torch.func import functional_call

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModel, WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.objectives.model_loss import (
    FlowNoise,
    Slices,
    draw_flow_noise,
    loss_weights,
    slice_losses,
)

SHORTCUT = {**FLOW, "condition_on_step_size": True}
TERMS = {"flow_matching": 0.7, "self_consistency": 0.3}


def ragged(**kwargs: object) -> Slices:
    """Slices of which some end early, by termination and truncation."""
    data = slice_data(**kwargs)
    data["next", "done"][1, 2] = data["next", "terminated"][1, 2] = True
    data["next", "done"][4, 0] = True
    return time_major(data)


def by_hand(model: WorldModel, s: Slices, form: str, gamma: float = 0.9, rho: float = 0.5) -> tuple[Tensor, ...]:
    """The terms, one loop per sum."""
    horizon, batch = s.action.shape[:2]
    z, step = model.encode(s.observation, s.task), gamma if form == "pwm" else rho
    dynamics = summed = averaged = ends = 0.0
    for t in range(horizon):
        z, logits, end = model.predict(z, s.action[t], s.task)
        target = model.encode(s.next_observation[t], s.task).detach()
        valid = [b for b in range(batch) if s.valid[t, b]]
        dynamics += step**t * sum(((z[b] - target[b]) ** 2).mean() for b in valid) / max(len(valid), 1)
        errors = model.reward.loss(logits, s.reward[t])
        summed += step**t * sum(errors[b] for b in valid) / max(len(valid), 1)
        averaged += step**t * sum(errors[b] for b in valid) / s.valid.sum()
        if end is not None:
            errors = model.termination.loss(end, s.terminated[t])
            ends += step**t * sum(errors[b] for b in valid) / s.valid.sum()
    if form == "pwm":
        return dynamics / horizon, averaged / horizon, ends / horizon
    return 20 * dynamics / horizon, 0.1 * summed / horizon, ends / horizon


@pytest.mark.parametrize("form", ["pwm", "tdmpc2"])
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("head", ["scalar", "two_hot"])
def test_terms_against_written_out_sums(form: str, tasks: bool, head: str) -> None:
    model = world_model(tasks, torch.float64, reward_head=head, termination=True)
    s = ragged(tasks=tasks, dtype=torch.float64)
    losses = slice_losses(model, s, loss_weights(form, 0.9))
    for ours, expected in zip(losses[:3], by_hand(model, s, form), strict=True):
        torch.testing.assert_close(ours, expected.squeeze())
    assert losses.flow_matching == losses.self_consistency == 0


def test_coefficients_scale_their_terms() -> None:
    model, s = world_model(termination=True), ragged()
    plain = slice_losses(model, s, loss_weights("pwm", 0.9))
    scaled = slice_losses(model, s, loss_weights("pwm", 0.9, None, 2.0, 3.0, termination=5.0, rollout=7.0))
    for ours, other, factor in zip(scaled[:3], plain[:3], (14.0, 3.0, 5.0), strict=True):
        torch.testing.assert_close(ours, factor * other)
    assert loss_weights("pwm", 0.9, rho=0.3).step == 0.3


def test_steps_after_an_episodes_end_do_not_matter() -> None:
    dynamics = {**SHORTCUT, "imagination_substeps": 1}
    model, s = world_model(termination=True, dynamics=dynamics, dtype=torch.float64), ragged(dtype=torch.float64)
    assert (~s.valid).sum() == 2 + 4
    weights, noise = loss_weights("pwm", 0.9, **TERMS), draw_flow_noise(5, 6, s.reward)
    before = slice_losses(model, s, weights, noise)

    def perturbed(where: Tensor) -> Slices:
        change = {n: getattr(s, n) + 3.0 * where for n in ("next_observation", "action", "reward")}
        return s._replace(**change, terminated=s.terminated ^ where)

    after = slice_losses(model, perturbed(~s.valid), weights, noise)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    # not vacuous: a change of the last valid step of the same slice is seen by every term
    last = torch.zeros_like(s.valid)
    last[2, 1] = True
    seen = slice_losses(model, perturbed(last), weights, noise)
    assert all(not torch.equal(x, y) for x, y in zip(before, seen, strict=True))


def test_targets_and_rewards_get_no_gradient_through_the_target_encoding() -> None:
    model, s = world_model(), ragged()
    next_observation = s.next_observation.clone().requires_grad_()
    loss = sum(slice_losses(model, s._replace(next_observation=next_observation), loss_weights("pwm", 0.9)))
    assert torch.autograd.grad(loss, next_observation, allow_unused=True)[0] is None


@pytest.mark.parametrize("dynamics", [{"kind": "mlp"}, {"kind": "residual"}, SHORTCUT], ids=["mlp", "residual", "flow"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5), (4, 2)])
def test_parts_of_a_batch_add_up(dynamics: dict, sizes: tuple[int, ...]) -> None:
    """Micro-batches with the whole batch's counts and noise: same losses, same gradients."""
    flow = dynamics["kind"] == "flow"
    model = world_model(True, torch.float64, termination=True, dynamics=dynamics, reward_head="two_hot")
    s = ragged(tasks=True, dtype=torch.float64)
    weights = loss_weights("pwm", 0.9, **(TERMS if flow else {}))
    noise = draw_flow_noise(5, 6, s.reward) if flow else None
    parameters = list(model.parameters())
    whole = sum(slice_losses(model, s, weights, noise))
    expected = torch.autograd.grad(whole, parameters)

    valid = s.valid.double()
    counts = (valid.sum(1, keepdim=True), valid.sum())
    total, actual, first = 0.0, [torch.zeros_like(p) for p in parameters], 0
    for size in sizes:
        part = slice(first, first + size)
        first += size
        sub = Slices(s.observation[part], *(x[:, part] for x in s[1:6]), s.task[part])
        sub_noise = FlowNoise(*(x[:, part] for x in noise)) if flow else None
        loss = sum(slice_losses(model, sub, weights, sub_noise, counts))
        total += loss.item()
        for total_grad, g in zip(actual, torch.autograd.grad(loss, parameters), strict=True):
            total_grad += g
    assert total == pytest.approx(whole.item(), rel=1e-12)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["pwm", "tdmpc2"])
@pytest.mark.parametrize("dynamics", [{"kind": "mlp"}, SHORTCUT], ids=["mlp", "flow"])
def test_gradients_in_double_precision(form: str, dynamics: dict) -> None:
    """Every parameter of the model that the loss reaches without a stopped gradient."""
    spec = WorldModelSpec(
        OBS, 3, 8, [5], [4], simnorm_dim=4, reward_head="two_hot", num_bins=7, termination=True, dynamics=dynamics
    )
    model = randomized(make_world_model(spec).double())
    s = ragged(dtype=torch.float64)
    weights = loss_weights(
        form, 0.9, **({"flow_matching": 0.7, "flow_matching_source": "attached"} if dynamics is SHORTCUT else {})
    )
    noise = draw_flow_noise(5, 6, s.reward)
    # The encoder's stopped target is no function of its weights for the loss, but is for finite differences.
    names = [n for n, _ in model.named_parameters() if not n.startswith("encoder")]

    def loss(*values: Tensor) -> Tensor:
        return sum(
            functional_call(
                Whole(model), {f"model.{n}": v for n, v in zip(names, values, strict=True)}, (s, weights, noise)
            )
        )

    assert torch.autograd.gradcheck(loss, [dict(model.named_parameters())[n] for n in names], atol=1e-6, fast_mode=True)


class Whole(torch.nn.Module):
    """The loss as a module, so that its parameters can be replaced."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object) -> tuple[Tensor, ...]:
        return slice_losses(self.model, *args)


class TestFlowTerms:
    @pytest.mark.parametrize("source", ["teacher", "detached", "attached"])
    def test_source_of_the_flow(self, source: str) -> None:
        model, s = world_model(True, torch.float64, dynamics=SHORTCUT), ragged(tasks=True, dtype=torch.float64)
        noise = draw_flow_noise(5, 6, s.reward)
        losses = slice_losses(model, s, loss_weights("pwm", 0.9, flow_matching_source=source, **TERMS), noise)

        z, target = [model.encode(s.observation, s.task)], model.encode(s.next_observation, s.task).detach()
        for action in s.action:
            z.append(model.predict(z[-1], action, s.task)[0])
        starts = torch.stack(z[:-1]) if source != "teacher" else torch.cat([z[0].unsqueeze(0), target[:-1]])
        starts = starts if source == "attached" else starts.detach()
        matching = consistency = 0.0
        e = model.embed(s.task)
        for t in range(5):
            a = model.mask_action(s.action[t], s.task)
            weight = 0.9**t / 5 * s.valid[t] / s.valid[t].sum()
            args = (starts[t], target[t], a)
            matching += 0.7 * (weight * model.dynamics.flow_matching_error(*args, noise.tau[t], e)).sum()
            error = model.dynamics.self_consistency_error(*args, noise.half_step[t], noise.half_step_tau[t], e)
            consistency += 0.3 * (weight * error).sum()
        torch.testing.assert_close(losses.flow_matching, matching)
        torch.testing.assert_close(losses.self_consistency, consistency)
        p = [q for n, q in model.named_parameters() if n.startswith(("encoder", "dynamics"))]
        ours, theirs = (torch.autograd.grad(x, p, allow_unused=True) for x in (losses.flow_matching, matching))
        for g, expected in zip(ours, theirs, strict=True):
            assert (g is None) == (expected is None)
            if g is not None:
                torch.testing.assert_close(g, expected)
        reaches_encoder = ours[0] is not None and ours[0].abs().max() > 0
        assert reaches_encoder == (source == "attached")

    def test_are_zero_without_their_weights(self) -> None:
        model, s = world_model(dynamics=SHORTCUT), ragged()
        calls = []
        model.dynamics.net.register_forward_hook(lambda *_: calls.append(1))
        slice_losses(model, s, loss_weights("pwm", 0.9))
        assert len(calls) == 5 * model.dynamics.evaluations, "nothing is computed for them either"

    @given(horizon=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(0, 2**31))
    def test_noise_lies_on_its_grid(self, horizon: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tau, d, d_tau = draw_flow_noise(horizon, batch, torch.zeros(()), generator)
        for x in (tau, d, d_tau):
            assert x.shape == (horizon, batch, 1)
        assert ((tau >= 0) & (tau < 1)).all()
        assert torch.isin(d, torch.tensor([0.5, 0.25, 0.125])).all()
        assert ((d_tau / (2 * d)) % 1 == 0).all(), "starts are whole steps of 2d"
        assert ((d_tau >= 0) & (d_tau + 2 * d <= 1)).all(), "and end at 1 at the latest"

    def test_noise_uses_the_whole_grid(self) -> None:
        _, d, tau = draw_flow_noise(100, 100, torch.zeros(()), torch.Generator().manual_seed(0))
        for half, fraction in ((0.5, 1 / 3), (0.25, 1 / 3), (0.125, 1 / 3)):
            assert (d == half).float().mean() == pytest.approx(fraction, abs=0.03)
            assert set(tau[d == half].tolist()) == {k * 2 * half for k in range(round(0.5 / half))}

    @pytest.mark.parametrize(
        ("dynamics", "terms", "message"),
        [
            ({"kind": "mlp"}, {"flow_matching": 1.0}, r"flow_matching_weight .*need model\.dynamics\.kind=flow"),
            ({"kind": "residual"}, {"self_consistency": 1.0}, r"need model\.dynamics\.kind=flow"),
            ({**FLOW, "parameterization": "tangent"}, {"self_consistency": 1.0}, "parameterization=residual_endpoint"),
            (FLOW, {"self_consistency": 1.0}, "condition_on_step_size=true"),
        ],
    )
    def test_models_that_lack_them(self, dynamics: dict, terms: dict, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            slice_losses(world_model(dynamics=dynamics), ragged(), loss_weights("pwm", 0.9, **terms))


class Calls:
    """Counts the evaluations of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.count += 1


class TestFewStep:
    MODEL: ClassVar[dict] = {**SHORTCUT, "imagination_substeps": 1}

    def test_value(self) -> None:
        """The few-step map's rollout against the encodings, beside all that the solver's gives."""
        model, s = world_model(dtype=torch.float64, dynamics=self.MODEL), ragged(dtype=torch.float64)
        losses = slice_losses(model, s, loss_weights("pwm", 0.9, few_step=0.7))
        without = slice_losses(model, s, loss_weights("pwm", 0.9, few_step=0.0))
        assert losses[:-1] == without[:-1]
        assert without.few_step == 0
        z, expected = model.encode(s.observation), 0.0
        for t in range(5):
            z = model.dynamics.endpoint(z, z, s.action[t], 0.0, 1.0)
            errors = (z - model.encode(s.next_observation[t])).square().mean(-1, keepdim=True)
            expected += 0.9**t * errors[s.valid[t]].mean().item() / 5
        assert losses.few_step.item() == pytest.approx(0.7 * expected, rel=1e-9)

    def test_rollout_of_the_map_alone(self) -> None:
        """One evaluation per step for the rollout and one for flow matching, where the solver takes seven."""
        model, s = world_model(dynamics={**self.MODEL, "solver": "heun", "substeps": 4}), ragged()
        calls = Calls(model.dynamics.net)
        slice_losses(model, s, loss_weights("pwm", 0.9, flow_matching=1.0))
        assert calls.count == 5 * 7 + 5 + 1
        calls.count = 0
        losses = slice_losses(model, s, loss_weights("pwm", 0.9, flow_matching=1.0, few_step_rollout=True))
        assert calls.count == 5 + 1
        assert losses.few_step == 0
        assert losses.flow_matching > 0

    def test_imagination_takes_it(self) -> None:
        model = world_model(dynamics={**self.MODEL, "solver": "heun", "substeps": 4})
        calls = Calls(model.dynamics.net)
        z, a = model.encode(torch.randn(3, OBS)), torch.rand(3, A)
        imagined, _, _ = model(z, a)
        soft, _, _ = model.soft_step(z, a)
        assert calls.count == 2
        assert torch.equal(imagined, soft)
        assert torch.equal(imagined, model.dynamics.imagine(z, a))

    @pytest.mark.parametrize(("dynamics", "matching"), [(SHORTCUT, 1.0), (MODEL, 0.0)])
    def test_refused(self, dynamics: dict, matching: float) -> None:
        with pytest.raises(ConfigurationError, match=r"model\.loss\.few_step_rollout"):
            PWMModelLoss(world_model(dynamics=dynamics), few_step_rollout=True, flow_matching_weight=matching)


@pytest.mark.parametrize(
    ("form", "rest", "message"),
    [
        ("dreamer", {}, r"form='dreamer' is not one of pwm, tdmpc2"),
        ("pwm", {"flow_matching_source": "z"}, "'z' is not one of teacher"),
    ],
)
def test_unknown_names(form: str, rest: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        loss_weights(form, 0.99, **rest)
