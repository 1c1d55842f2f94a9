"""The flows: the default one never leaves the simplex; steps, losses and inputs of all are what they should be."""

from __future__ import annotations

import pytest
import torch
from dynamics_cases import CONDITIONED, VARIANTS, A, D, V, dynamics, group_sums, latents, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    Dynamics,
    SimNormVelocityFlow,
)
from pwm_torchrl.modules.dynamics.flows import VelocityFlow
from pwm_torchrl.modules.numerics import EPSILON, residual_endpoint


class TestResidualEndpoint:
    @settings(max_examples=60, deadline=None)
    @given(
        substeps=st.integers(1, 12),
        solver=st.sampled_from(["euler", "heun"]),
        scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
        corner=st.booleans(),
        conditioned=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_never_leaves_the_simplex(
        self, substeps: int, solver: str, scale: float, corner: bool, conditioned: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        extra = {**CONDITIONED, "condition_on_step_size": True} if conditioned else {}
        d = randomize(dynamics(solver=solver, substeps=substeps, **extra), scale, seed)
        z = latents(3)
        if corner:  # one-hot groups: the other seven entries are the zeros that a saturated SimNorm leaves
            z = torch.nn.functional.one_hot(z.unflatten(-1, (-1, V)).argmax(-1), V).float().flatten(-2)
        z, a = z.requires_grad_(), torch.rand(3, A, requires_grad=True)
        state = z
        for _ in range(3):
            state = d(state, a)
            assert (state >= 0).all()
            torch.testing.assert_close(group_sums(state), torch.ones(3, D // V), rtol=0, atol=2e-6)
        for gradient in torch.autograd.grad((state * torch.randn(D)).sum(), [z, a, *d.parameters()]):
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("parameterization", ["tangent", "simnorm_velocity"])
    def test_only_this_parameterisation_stays_there(self, parameterization: str) -> None:
        """The property above is not vacuous: the others leave the simplex with such weights."""
        d = randomize(dynamics(parameterization=parameterization), 10.0)
        z = d(latents(3), torch.rand(3, A))
        assert (z < 0).any() or (group_sums(z) > 1.5).any()

    def test_zero_logits_leave_the_latent_where_it_is(self) -> None:
        z = latents(5)
        torch.testing.assert_close(residual_endpoint(z, torch.zeros(5, D), V), z, rtol=0, atol=1e-5)

    def test_floor_has_finite_gradients_and_lets_go(self) -> None:
        z = torch.zeros(1, V)
        z[0, 0] = 1.0
        z.requires_grad_()
        logits = torch.zeros(1, V, requires_grad=True)
        out = residual_endpoint(z, logits, V)
        torch.testing.assert_close(out.sum(), torch.ones(()))
        assert (out[0, 1:] > 0).all(), "an entry at zero can come back"
        torch.testing.assert_close(out[0, 1], torch.tensor(EPSILON), rtol=1e-3, atol=0)
        gradients = torch.autograd.grad(out[0, 1], (z, logits))
        assert all(g.isfinite().all() for g in gradients)
        assert gradients[1][0, 1] > 0

    @pytest.mark.parametrize("solver", ["euler", "heun"])
    def test_one_substep_is_the_residual_mlp(self, solver: str) -> None:
        """With the weights of τ = 0 removed: K = 1 and ``residual`` are the same function."""
        flow = dynamics(solver=solver, substeps=1, match_parameters=False)
        residual = dynamics("residual", match_parameters=False)
        state = flow.state_dict()
        state["net.0.weight"] = state["net.0.weight"][:, :-1]  # the last input is τ
        residual.load_state_dict(state)
        z, a = latents(5), torch.rand(5, A)
        torch.testing.assert_close(flow(z, a), residual(z, a))

    @pytest.mark.parametrize("substeps", range(1, 13))
    def test_steps_are_those_of_the_velocity_form(self, substeps: int) -> None:
        """v = (x̂ − z_τ) / (1 − τ), integrated by textbook Euler and Heun whose last substep is Euler's."""
        torch.manual_seed(substeps)
        z_0, a, dt = latents(3, dtype=torch.float64), torch.rand(3, A, dtype=torch.float64), 1 / substeps
        for solver in ("euler", "heun"):
            d = randomize(dynamics(solver=solver, substeps=substeps, **CONDITIONED).double(), 0.5)

            def velocity(z: Tensor, tau: float, d: Dynamics = d) -> Tensor:
                return (d.endpoint(z, z_0, a, tau, dt) - z) / (1 - tau)

            z = z_0
            for k in range(substeps):
                v = velocity(z, k * dt)
                if solver == "heun" and k < substeps - 1:
                    v = (v + velocity(z + dt * v, (k + 1) * dt)) / 2
                z = z + dt * v
            torch.testing.assert_close(d(z_0, a), z)

    def test_conditioning_inputs_matter(self) -> None:
        z, start, a = latents(4), latents(4), torch.rand(4, A)
        plain = dynamics()
        assert torch.equal(plain.endpoint(z, start, a, 0.5, 0.25), plain.endpoint(z, z, a, 0.5, 0.125))
        assert not torch.equal(plain.endpoint(z, z, a, 0.5, 0.25), plain.endpoint(z, z, a, 0.25, 0.25))
        on_start = dynamics(condition_on_start=True)
        assert not torch.equal(on_start.endpoint(z, start, a, 0.5, 0), on_start.endpoint(z, z, a, 0.5, 0))
        on_step = dynamics(condition_on_step_size=True)
        assert not torch.equal(on_step.endpoint(z, z, a, 0.5, 0.25), on_step.endpoint(z, z, a, 0.5, 0.125))

    def test_solver_feeds_its_step_size_and_times(self) -> None:
        d, seen = dynamics(solver="heun", substeps=4, condition_on_step_size=True), []
        d.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -2:].tolist()))
        d(latents(2), torch.rand(2, A))
        taus, steps = zip(*seen)
        assert taus == (0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75)
        assert set(steps) == {0.25}

    def test_time_as_number_and_as_tensor_agree(self) -> None:
        d, z, a = dynamics(time_features=3), latents(4), torch.rand(4, A)
        torch.testing.assert_close(d.endpoint(z, z, a, 0.3, 0), d.endpoint(z, z, a, torch.full((4, 1), 0.3), 0))

    def test_flow_matching_error_is_in_endpoint_space(self) -> None:
        d, z, target, a, tau = dynamics(**CONDITIONED), latents(4), latents(4), torch.rand(4, A), torch.rand(4, 1)
        x_hat = d.endpoint((1 - tau) * z + tau * target, z, a, tau, 0.0)
        expected = ((x_hat - target) ** 2).mean(-1, keepdim=True)
        torch.testing.assert_close(d.flow_matching_error(z, target, a, tau), expected)

    @pytest.mark.parametrize("d_half", [0.5, 0.25, 0.125])
    def test_self_consistency_target_is_two_half_steps(self, d_half: float) -> None:
        """One step of 2d with the target as its endpoint lands where two steps of d, taken one by one, land."""
        torch.manual_seed(0)
        flow = randomize(dynamics(condition_on_step_size=True, condition_on_start=True).double(), 0.5)
        start, target = latents(5, dtype=torch.float64), latents(5, dtype=torch.float64)
        a = torch.rand(5, A, dtype=torch.float64)
        for k in range(round(1 / (2 * d_half))):
            tau = k * 2 * d_half
            z = z_tau = (1 - tau) * start + tau * target
            for i in range(2):
                now = tau + i * d_half
                x_hat = flow.endpoint(z, start, a, now, d_half)
                z = z + d_half * (x_hat - z) / (1 - now)
            # z = z_tau + 2d · (goal − z_tau) / (1 − τ), solved for the goal
            goal = z_tau + (z - z_tau) * (1 - tau) / (2 * d_half)
            assert (goal > -1e-12).all(), "the target is a convex combination"
            x_hat = flow.endpoint(z_tau, start, a, tau, 2 * d_half)
            expected = ((x_hat - goal) ** 2).mean(-1, keepdim=True)
            full = torch.full((5, 1), 1.0, dtype=torch.float64)
            error = flow.self_consistency_error(start, target, a, d_half * full, tau * full)
            torch.testing.assert_close(error, expected)
            # the target carries no gradient: that of the error is that of the prediction alone
            p = list(flow.parameters())
            for ours, theirs in zip(
                torch.autograd.grad(error.sum(), p),
                torch.autograd.grad(((x_hat - goal.detach()) ** 2).mean(-1).sum(), p),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs)

    def test_self_consistency_needs_the_step_size_input(self) -> None:
        with pytest.raises(ConfigurationError, match="condition_on_step_size=true"):
            dynamics().self_consistency_error(*(latents(2) for _ in range(5)))


class TestFewStep:
    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_is_eulers_method_with_the_same_network(self, steps: int) -> None:
        options = {"condition_on_step_size": True, "match_parameters": False}
        few = dynamics(solver="heun", substeps=4, imagination_substeps=steps, **options)
        euler = dynamics(solver="euler", substeps=steps, **options)
        euler.load_state_dict(few.state_dict())
        z, a = latents(5), torch.rand(5, A)
        torch.testing.assert_close(few.imagine(z, a), euler(z, a))
        assert not torch.allclose(few.imagine(z, a), few(z, a))
        assert (few.evaluations, few.imagined_evaluations) == (7, steps)

    def test_without_one_imagination_takes_the_solver(self) -> None:
        flow = dynamics(solver="heun", substeps=2)
        z, a = latents(5), torch.rand(5, A)
        assert torch.equal(flow.imagine(z, a), flow(z, a))
        assert flow.imagined_evaluations == flow.evaluations == 3
        assert not flow.few_step

    @pytest.mark.parametrize("options", [{"imagination_substeps": 0}, {"parameterization": "tangent"}])
    def test_refused(self, options: dict) -> None:
        with pytest.raises(ConfigurationError, match="imagination_substeps"):
            dynamics(**{"imagination_substeps": 1, **options})


# Flows whose network predicts a velocity ------------------------------------------------------------------------------


class TestVelocityFlows:
    @pytest.mark.parametrize("solver", ["euler", "heun"])
    def test_tangent_keeps_group_sums(self, solver: str) -> None:
        d = randomize(dynamics(parameterization="tangent", solver=solver), 1.0)
        z = start = torch.rand(5, D)
        for _ in range(4):
            z = d(z, torch.rand(5, A))
        assert (z - start).abs().max() > 0.1
        torch.testing.assert_close(group_sums(z), group_sums(start), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("solver", "substeps"), VARIANTS.values())
    def test_simnorm_velocity_gains_one_per_group_and_transition(self, solver: str, substeps: int) -> None:
        d = randomize(dynamics(parameterization="simnorm_velocity", solver=solver, substeps=substeps), 1.0)
        z = latents(5)
        for t in range(1, 6):
            z = d(z, torch.rand(5, A))
            torch.testing.assert_close(group_sums(z), torch.full((5, D // V), 1.0 + t))

    def test_flow_matching_error_is_that_of_the_velocity(self) -> None:
        d: VelocityFlow = dynamics(parameterization="tangent")
        z, target, a, tau = latents(4), latents(4), torch.rand(4, A), torch.rand(4, 1)
        v = d.velocity((1 - tau) * z + tau * target, z, a, tau)
        torch.testing.assert_close(
            d.flow_matching_error(z, target, a, tau), ((v - (target - z)) ** 2).mean(-1, keepdim=True)
        )

    def test_heun_is_exact_for_a_velocity_linear_in_time(self) -> None:
        class Linear(VelocityFlow):
            def velocity(self, latent: Tensor, start: Tensor, action: Tensor, tau: float, _: None = None) -> Tensor:
                return torch.full_like(latent, 2 * tau)

        for k in (1, 3, 4):
            torch.testing.assert_close(Linear(V, "heun", k)(torch.zeros(2, D), None), torch.ones(2, D))
            torch.testing.assert_close(Linear(V, "euler", k)(torch.zeros(2, D), None), torch.full((2, D), 1 - 1 / k))

    def test_simnorm_velocity_cannot_reach_its_target(self) -> None:
        """Per transition t the error is at least ((t + 1) / V)²; the floor is met when everything is uniform."""
        flow = randomize(SimNormVelocityFlow(D, A, 0, [24]), 0.0)
        z, target, a = torch.full((4, D), 1 / V), torch.full((4, D), 1 / V), torch.rand(4, A)
        total, gamma, horizon = 0.0, 0.99, 16
        for t in range(horizon):
            error = flow.flow_matching_error(z, target, a, torch.rand(4, 1))
            torch.testing.assert_close(error, torch.full((4, 1), ((t + 1) / V) ** 2))
            total += gamma**t * error.mean().item() / horizon
            z = flow(z, a)
        assert total == pytest.approx(1.303935, abs=2e-6)
        assert sum(gamma**t * ((t + 1) / V) ** 2 for t in range(horizon)) / horizon == pytest.approx(1.303935, abs=1e-6)

    @settings(max_examples=30, deadline=None)
    @given(scale=st.sampled_from([0.1, 1.0, 10.0]), t=st.integers(0, 15), seed=st.integers(0, 999))
    def test_no_weights_go_below_the_floor(self, scale: float, t: int, seed: int) -> None:
        torch.manual_seed(seed)
        flow = randomize(SimNormVelocityFlow(D, A, 0, [24]), scale, seed)
        z, target, a = latents(4), latents(4), torch.rand(4, A)
        with torch.no_grad():
            for _ in range(t):
                z = flow(z, a)
            error = flow.flow_matching_error(z, target, a, torch.rand(4, 1))
        assert (error >= ((t + 1) / V) ** 2 * (1 - 1e-5)).all()
