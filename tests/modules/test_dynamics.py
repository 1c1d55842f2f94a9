"""Dynamics of every kind and solver: sizes, evaluation counts, gradients, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from dynamics_cases import CONDITIONED, FLOWS, VARIANTS, A, D, E, dynamics, latents, randomize

from pwm_torchrl.choices import sizes
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    WorldModelSpec,
    count_parameters,
    make_dynamics,
    make_world_model,
)

ALL = [
    pytest.param({"kind": "mlp"}, id="mlp"),
    pytest.param({"kind": "residual"}, id="residual"),
    *(
        pytest.param(
            {"parameterization": p, "solver": s, "substeps": k, **extra}, id=f"{p}-{name}{'-conditioned' * bool(extra)}"
        )
        for p in FLOWS
        for name, (s, k) in {**VARIANTS, "euler1": ("euler", 1), "heun1": ("heun", 1), "heun3": ("heun", 3)}.items()
        for extra in ({}, CONDITIONED)
        if not (extra and p == "simnorm_velocity")
    ),
]


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "latent_dim", "expected"),
        [("5m", 512, 1_469_953), ("19m", 512, 5_319_681), ("48m", 768, 18_489_089), ("317m", 1376, 106_758_209)],
    )
    def test_published_parameter_counts(self, size: str, latent_dim: int, expected: int) -> None:
        s = sizes()[size]
        with torch.device("meta"):
            model = make_world_model(WorldModelSpec(37, 8, latent_dim, s.units, s.encoder_units))
        assert count_parameters(model) == expected

    @pytest.mark.parametrize("size", ["tiny", "5m", "19m", "48m", "317m"])
    @pytest.mark.parametrize(
        "options",
        [
            {"kind": "residual"},
            *({"kind": "flow", "parameterization": p} for p in FLOWS),
            *({"kind": "flow", "parameterization": p, **CONDITIONED} for p in FLOWS[:2]),
            {"kind": "flow", "condition_on_step_size": True, **CONDITIONED},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("task_dim", [0, 96])
    def test_kinds_are_compared_at_equal_parameter_count(self, size: str, options: dict, task_dim: int) -> None:
        s = sizes()[size]
        with torch.device("meta"):
            mlp = make_dynamics("mlp", s.latent_dim, 8, task_dim, s.units)
            other = make_dynamics(latent_dim=s.latent_dim, action_dim=8, task_dim=task_dim, units=s.units, **options)
        assert count_parameters(other) / count_parameters(mlp) == pytest.approx(1, abs=0.01)

    def test_matching_can_be_switched_off(self) -> None:
        flow = make_dynamics("flow", D, A, 0, [24, 24], match_parameters=False, **CONDITIONED)
        assert [layer.out_features for layer in flow.net] == [24, 24, D]


@pytest.mark.parametrize("options", ALL)
class TestEveryDynamics:
    def test_shapes_with_and_without_tasks(self, options: dict) -> None:
        z, a = latents(5, 4), torch.rand(5, 4, A)
        assert dynamics(**options)(z, a).shape == (5, 4, D)
        d = dynamics(task_dim=E, **options)
        e = torch.randn(4, E)
        assert torch.equal(d(z, a, e), d(z, a, e.expand(5, 4, E)))
        assert not torch.equal(d(z, a, e), d(z, a, -e)), "the task matters"

    def test_evaluations_are_what_is_announced(self, options: dict) -> None:
        d, calls = dynamics(**options), []
        d.net.register_forward_hook(lambda *_: calls.append(1))
        d(latents(2), torch.rand(2, A))
        assert len(calls) == d.evaluations

    def test_gradients_in_double_precision(self, options: dict) -> None:
        torch.manual_seed(0)
        d = randomize(dynamics(task_dim=E, **options).double(), 0.4)
        z, a = latents(2, dtype=torch.float64), torch.rand(2, A, dtype=torch.float64)
        e = torch.randn(2, E, dtype=torch.float64)
        inputs = tuple(x.requires_grad_() for x in (z, a, e))
        assert torch.autograd.gradcheck(d, inputs, atol=1e-6)


@pytest.mark.parametrize("options", [p for p in ALL if "parameterization" in p.values[0]])
class TestCheckpointing:
    def test_checkpointing_leaves_every_bit_of_the_gradients(self, options: dict) -> None:
        for dtype in (torch.float32, torch.float64):
            results = []
            for checkpoint in (False, True):
                d = dynamics(checkpoint_substeps=checkpoint, **options).to(dtype)
                randomize(d, 0.3, seed=1)
                torch.manual_seed(0)
                z, a = latents(4, dtype=dtype).requires_grad_(), torch.rand(4, A, dtype=dtype, requires_grad=True)
                out = d(z, a)
                loss = (out * torch.randn(out.shape, dtype=dtype)).sum()
                results.append([out, *torch.autograd.grad(loss, [z, a, *d.parameters()])])
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


class TestEvaluationCounts:
    @pytest.mark.parametrize(
        ("parameterization", "counts"),
        [("residual_endpoint", (3, 7, 8)), ("tangent", (4, 8, 8)), ("simnorm_velocity", (4, 8, 8))],
    )
    def test_of_the_named_systems(self, parameterization: str, counts: tuple[int, ...]) -> None:
        for (solver, substeps), expected in zip(VARIANTS.values(), counts, strict=True):
            d, calls = dynamics(parameterization=parameterization, solver=solver, substeps=substeps), []
            d.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            d(latents(2), torch.rand(2, A))
            assert len(calls) == expected


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "gru"}, r"model\.dynamics\.kind='gru' is not one of mlp, residual, flow\."),
            ({"kind": "flow", "parameterization": "free"}, r"parameterization='free' is not one of residual_endpoint"),
            ({"kind": "flow", "solver": "rk4"}, r"solver='rk4' is not one of euler, heun\."),
            ({"kind": "flow", "substeps": 0}, r"model\.dynamics\.substeps=0 must be at least 1"),
            ({"kind": "flow", "substeps": -1}, r"model\.dynamics\.substeps=-1"),
            (
                {"kind": "flow", "parameterization": "tangent", "condition_on_step_size": True},
                "needs parameterization=",
            ),
            ({"kind": "flow", "parameterization": "simnorm_velocity", "time_features": 1}, "takes neither"),
            ({"kind": "flow", "parameterization": "simnorm_velocity", "condition_on_start": True}, "takes neither"),
        ],
    )
    def test_one_clear_sentence(self, options: dict, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            dynamics(**options)

    def test_unknown_reward_head(self) -> None:
        with pytest.raises(ConfigurationError, match=r"model\.reward_head='mean' is not one of scalar, two_hot"):
            make_world_model(WorldModelSpec(3, 1, 16, [8], [8], reward_head="mean"))


def test_time_features_are_sines_and_cosines() -> None:
    from pwm_torchrl.modules.dynamics.flows import time_inputs

    inputs = time_inputs(0.3, torch.zeros(2, 5), 2)
    expected = [0.3, *(f(math.pi * k * 0.3) for k in (1, 2) for f in (math.sin, math.cos))]
    torch.testing.assert_close(inputs, torch.tensor(expected).expand(2, 5))
