"""The speed suite's plain implementation computes what it is compared for: golden values, and the package's flows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from golden_cases import Case, assert_agrees, find_cases
from golden_outputs import gradients_of

from pwm_torchrl.modules import ResidualDynamics, ResidualEndpointFlow

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_pwm import PlainPWM

CASE = "single_task_scalar_reward"


@pytest.fixture(scope="module")
def case() -> Case:
    return next(case for case in find_cases(Path(__file__).parent) if case.name == CASE)


@pytest.fixture(scope="module")
def plain(case: Case) -> PlainPWM:
    """With the case's weights; both list a network's parameters in definition order."""
    c = case.config
    widths = (c[key] for key in ("latent_dim", "units", "encoder_units", "actor_units", "critic_units"))
    pwm = PlainPWM(c["observation_dim"], c["action_dim"], *widths)
    networks = {"encoder": "_encoder", "dynamics": "_dynamics", "reward": "_reward"}
    for name, theirs in networks.items():
        fill(getattr(pwm, name), in_layer_order(case.of(f"world_model.{theirs}.")))
    fill(pwm.actor, in_layer_order(case.of("actor.actor.")))
    stacks = [p for _, p in sorted((int(k), p) for k, p in case.of("critic_ensemble.params.").items())]
    for k, critic in enumerate(pwm.critics):
        fill(critic, [stack[k] for stack in stacks])
    return pwm


def in_layer_order(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Linear weight, bias, then the norm's, layer by layer."""

    def place(name: str) -> tuple[int, bool, bool]:
        layer, *rest = name.split(".")
        return int(layer), "ln" in rest, rest[-1] == "bias"

    return [weights[name] for name in sorted(weights, key=place)]


def fill(module: torch.nn.Module, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)


def test_model_loss_and_gradients(case: Case, plain: PlainPWM) -> None:
    a = case.arrays
    loss = plain.model_loss(a["in.observation"], a["in.action"], a["in.reward"], case.config["gamma"])
    assert_agrees("loss", loss, a["out.wm_loss_total"])
    for name in ("encoder", "dynamics", "reward"):
        expected = in_layer_order(case.of(f"grad.world_model._{name}."))
        actual = torch.autograd.grad(loss, list(getattr(plain, name).parameters()), retain_graph=True)
        for k, pair in enumerate(zip(actual, expected, strict=True)):
            assert_agrees(f"{name} parameter {k}", *pair)


def test_actor_loss_targets_and_critic_loss(case: Case, plain: PlainPWM) -> None:
    a, c = case.arrays, case.config
    with torch.no_grad():
        start = plain.encoder(a["in.observation"][0])
    loss, latents, rewards = plain.actor_loss(start, len(a["in.action"]), None, c["gamma"])
    assert_agrees("loss", loss, a["out.detached_actor_input.actor_loss"])
    for name, gradient in gradients_of(loss, plain.actor).items():
        assert_agrees(name, gradient, a[f"grad.detached_actor_input.actor.actor.{name}"])
    assert_agrees("rewards", rewards, a["out.rollout_rewards"])
    targets = plain.targets(latents, rewards, c["gamma"], c["lmbda"])
    assert_agrees("targets", targets, a["out.td_lambda_targets"])
    loss = plain.critic_loss(latents[:-1], targets)
    assert_agrees("critic loss", loss, a["out.critic_loss_elementwise"])


@pytest.mark.parametrize(("solver", "substeps"), [("heun", 2), ("heun", 4), ("euler", 8), ("euler", 1)])
def test_flows_are_the_packages(solver: str, substeps: int) -> None:
    pwm = PlainPWM(5, 3, 16, [12, 12], [8], [8], [8], solver, substeps)
    ours = (
        ResidualDynamics(16, 3, 0, [12, 12])
        if substeps == 1
        else ResidualEndpointFlow(16, 3, 0, [12, 12], solver=solver, substeps=substeps)
    )
    with torch.no_grad():
        for parameter in pwm.dynamics.parameters():
            parameter.normal_(std=0.5)
    # Ours lists the norm of a layer after its linear part, as the plain one does.
    fill(ours, list(pwm.dynamics.parameters()))
    z = torch.randn(6, 16).view(6, 2, 8).softmax(-1).flatten(1).requires_grad_()
    a = torch.rand(6, 3)
    weight = torch.randn(6, 16)
    results = []
    for step, parameters in ((pwm.step, pwm.dynamics.parameters()), (ours, ours.parameters())):
        out = step(z, a)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [z, *parameters])])
    for plain_value, our_value in zip(*results, strict=True):
        torch.testing.assert_close(plain_value, our_value, rtol=1e-4, atol=1e-6)
