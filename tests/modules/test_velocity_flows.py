"""Flows whose network predicts a velocity: ``tangent`` and the public fork's."""

from __future__ import annotations

import pytest
import torch
from dynamics_cases import VARIANTS, A, D, V, dynamics, group_sums, latents, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pwm_torchrl.modules import (
    SimNormVelocityFlow,
)
from pwm_torchrl.modules.dynamics.flows import VelocityFlow


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
