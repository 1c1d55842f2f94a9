"""A transition as one function: its values and gradients are those of the solver written out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from dynamics_cases import A, D, dynamics, latents, randomize
from torch import Tensor
from torch.func import functional_call, vmap

from pwm_torchrl.modules import ResidualEndpointFlow, make_dynamics
from pwm_torchrl.modules.dynamics import flows, fused
from pwm_torchrl.modules.dynamics.base import tensors_of
from pwm_torchrl.modules.dynamics.fused import Schedule
from pwm_torchrl.modules.numerics import products_in
from pwm_torchrl.objectives.base import frozen

SOLVERS = [("euler", 1), ("euler", 8), ("heun", 1), ("heun", 2), ("heun", 4)]


def written_out() -> object:
    return mock.patch.object(flows, "fuses", return_value=False)


def made(solver: str = "heun", substeps: int = 4, seed: int = 0, **options: object) -> ResidualEndpointFlow:
    return randomize(dynamics(solver=solver, substeps=substeps, **options), 1.0, seed)


def results(d: ResidualEndpointFlow, z: Tensor, a: Tensor, e: Tensor | None = None) -> dict[str, Tensor | None]:
    """The next latent and the gradients of a weighted sum of it."""
    given = {"latent": z.clone().requires_grad_(), "action": a.clone().requires_grad_()}
    if e is not None:
        given["task"] = e.clone().requires_grad_()
    for parameter in d.parameters():
        parameter.grad = None
    out = d(*given.values())
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    return {
        "out": out.detach(),
        **{name: x.grad for name, x in given.items()},
        **{name: p.grad for name, p in tensors_of(d).items()},
    }


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    differing = {
        name
        for name, value in expected.items()
        if (value is None) != (actual[name] is None)
        or (value is not None and not torch.allclose(actual[name], value, rtol=tolerance, atol=tolerance))
    }
    assert not differing


@pytest.fixture
def calls():
    """Counts the fused transitions, so that no comparison is of the plain form with itself."""
    with mock.patch.object(flows, "fused_transition", wraps=fused.fused_transition) as counted:
        yield counted


class TestEqualsTheSolverWrittenOut:
    @pytest.mark.parametrize(("solver", "substeps"), SOLVERS)
    @pytest.mark.parametrize("options", [{}, {"time_features": 2, "condition_on_step_size": True}])
    def test_in_float64(self, calls, solver, substeps, options):
        d = made(solver, substeps, **options).double()
        z, a = latents(5).double(), torch.rand(5, A).double()
        actual = results(d, z, a)
        assert calls.call_count == 1
        with written_out():
            assert_same(actual, results(d, z, a), 1e-12)

    @pytest.mark.parametrize("units", [[], [12], [12, 20, 16]])
    def test_for_any_depth(self, calls, units):
        d = randomize(make_dynamics("flow", D, A, 0, units, 8, solver="heun", substeps=4), 1.0).double()
        z, a = latents(5).double(), torch.rand(5, A).double()
        actual = results(d, z, a)
        assert calls.call_count == 1
        with written_out():
            assert_same(actual, results(d, z, a), 1e-12)

    def test_with_tasks_and_missing_leading_dimensions(self, calls):
        d = made(task_dim=3).double()
        z, a = torch.stack([latents(4), latents(4)]).double(), torch.rand(4, A).double()
        e = torch.rand(4, 3).double()
        actual = results(d, z, a, e)
        assert calls.call_count == 1
        assert actual["out"].shape == (2, 4, D)
        with written_out():
            assert_same(actual, results(d, z, a, e), 1e-12)

    def test_below_the_floor_of_the_logarithm(self, calls):
        d = made().double()
        z = torch.zeros(2, D).double()
        z[:, ::8] = 1.0
        a = torch.rand(2, A).double()
        actual = results(d, z, a)
        assert calls.call_count == 1
        with written_out():
            assert_same(actual, results(d, z, a), 1e-12)

    def test_by_finite_differences(self):
        d = made(substeps=2).double()
        z, a = latents(2).double().requires_grad_(), torch.rand(2, A).double().requires_grad_()
        names, tensors = zip(*d.named_parameters(), strict=True)

        def out(z: Tensor, a: Tensor, *parameters: Tensor) -> Tensor:
            return functional_call(d, dict(zip(names, parameters, strict=True)), (z, a))

        assert torch.autograd.gradcheck(out, (z, a, *tensors), fast_mode=True)


class TestWhatIsAskedFor:
    def test_frozen_parameters_get_no_gradient_and_keep_no_inputs(self, calls):
        d = made()
        z, a = latents(5), torch.rand(5, A)
        sizes: dict[str, int] = {}

        def kept(name: str) -> None:
            def pack(x: Tensor) -> Tensor:
                sizes[name] = sizes.get(name, 0) + x.numel()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                d(z.requires_grad_(), a)

        kept("training")
        with frozen(d):
            kept("imagination")
            actual = results(d, z.detach(), a)
            with written_out():
                assert_same(actual, results(d, z.detach(), a), 1e-5)
        assert calls.call_count == 3
        assert {name for name, x in actual.items() if x is None} == set(dict(d.named_parameters()))
        assert sizes["imagination"] < sizes["training"]

    def test_without_gradients_nothing_is_kept(self, calls):
        d, z, a = made(), latents(5), torch.rand(5, A)
        packed: list[Tensor] = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            out = d(z, a)
        assert calls.call_count == 1
        assert packed == []
        assert not out.requires_grad
        torch.testing.assert_close(out, d(z, a).detach(), rtol=1e-6, atol=1e-6)

    def test_inputs_stay_as_they_are(self):
        d, z, a = made(), latents(5), torch.rand(5, A)
        before = z.clone(), a.clone()
        results(d, z, a)
        assert torch.equal(z, before[0])
        assert torch.equal(a, before[1])

    def test_no_rows(self):
        assert made()(latents(5)[:0], torch.rand(0, A)).shape == (0, D)


class TestPrecision:
    def test_products_in_bfloat16_stay_near(self, calls):
        d, z, a = made(), latents(64), torch.rand(64, A)
        exact = results(d, z, a)
        with products_in(torch.bfloat16):
            low = results(d, z, a)
        assert calls.call_count == 2
        for name, value in exact.items():
            assert 0 < (low[name] - value).norm() / value.norm() < 0.02, name


class TestWhereItDoesNotApply:
    @pytest.mark.parametrize("options", [{"condition_on_start": True}, {"kind": "residual"}])
    def test_other_dynamics_are_written_out(self, calls, options):
        dynamics(**options)(latents(3), torch.rand(3, A))
        assert calls.call_count == 0

    def test_transforms_see_every_operation(self, calls):
        d, z, a = made(), latents(4), torch.rand(4, A)
        one_by_one = vmap(lambda z, a: d(z, a))(z, a)
        assert calls.call_count == 0
        torch.testing.assert_close(one_by_one, d(z, a), rtol=1e-5, atol=1e-6)

    def test_a_compiler_too(self, calls):
        d, z, a = made(substeps=2), latents(4), torch.rand(4, A)
        compiled = torch.compile(d, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(z, a), d(z, a), rtol=1e-5, atol=1e-6)
        assert calls.call_count == 1

    def test_hooks_are_called(self, calls):
        d = made()
        seen: list[int] = []
        d.net[0].register_forward_hook(lambda *args: seen.append(1))
        d(latents(3), torch.rand(3, A))
        assert calls.call_count == 0
        assert len(seen) == d.evaluations

    def test_hooks_of_gradients_are_called(self, calls):
        d = made()
        seen: list[int] = []
        d.net[0].register_full_backward_hook(lambda *args: seen.append(1))
        d(latents(3).requires_grad_(), torch.rand(3, A)).sum().backward()
        assert calls.call_count == 0
        assert len(seen) == d.evaluations

    def test_an_exchanged_activation(self, calls):
        d = made()
        d.net[0].activation = torch.nn.Tanh()
        d(latents(3), torch.rand(3, A))
        assert calls.call_count == 0


@pytest.mark.parametrize(("solver", "substeps"), SOLVERS)
def test_the_schedule_has_the_times_that_the_solver_passes_on(solver, substeps):
    d = made(solver, substeps).double()
    seen: list[float] = []
    d.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0, -1].item()))
    z = latents(2).double()
    d(z, torch.rand(2, A).double())
    assert Schedule(solver, substeps).times(z).tolist() == seen
