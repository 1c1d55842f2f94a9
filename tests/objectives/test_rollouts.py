"""Value targets of imagined rollouts by TorchRL's estimators, where the loss is asked for them."""

from __future__ import annotations

import pytest
import torch
from objective_cases import B, D, H, Networks, randomized
from torchrl.objectives import ValueEstimators
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator

from pwm_torchrl.modules import CriticEnsemble, value_module
from pwm_torchrl.objectives.actor_loss import estimated_targets
from pwm_torchrl.objectives.imagination import Imagined, td_lambda_targets


def rollout(batch: int = B) -> tuple[Imagined, torch.Tensor]:
    ended = torch.rand(H, batch, 1) < 0.3
    return Imagined(torch.rand(H + 1, batch, D), (), torch.randn(H, batch, 1), ended), torch.randn(H, batch, 1)


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_estimator_without_a_network_takes_the_rollouts_values(vectorized: bool) -> None:
    imagined, value = rollout()
    estimator = TDLambdaEstimator(gamma=0.9, lmbda=0.7, value_network=None, vectorized=vectorized)
    expected = td_lambda_targets(imagined.reward, value, imagined.terminated, 0.9, 0.7)
    torch.testing.assert_close(estimated_targets(estimator, imagined, value, "latent"), expected)


def test_an_estimator_with_a_network_evaluates_the_latents() -> None:
    imagined, value = rollout()
    critics = randomized(CriticEnsemble(D, [10]))
    estimator = TD0Estimator(gamma=0.9, value_network=value_module(critics, latent=("s", "z")))
    targets = estimated_targets(estimator, imagined, value, ("s", "z"))
    expected = imagined.reward + 0.9 * critics.value(imagined.latent[1:]) * ~imagined.terminated
    torch.testing.assert_close(targets, expected)
    assert not targets.requires_grad
    assert all(p.requires_grad for p in critics.parameters())


def test_a_share_of_no_rollouts_has_no_targets() -> None:
    imagined, value = rollout(0)
    estimator = TD0Estimator(gamma=0.9, value_network=None)
    assert estimated_targets(estimator, imagined, value, "latent").shape == (H, 0, 1)


def test_an_estimators_network_is_none_of_the_losss() -> None:
    n = Networks()
    loss, names = n.loss(), list(n.loss().state_dict())
    loss.make_value_estimator(TD0Estimator(gamma=0.9, value_network=value_module(CriticEnsemble(D, [10]))))
    assert list(loss.state_dict()) == names
    assert {id(p) for p in loss.parameters()} == {id(p) for p in n.actor.parameters()}
    assert isinstance(loss.value_estimator, TD0Estimator)


def test_gamma_of_an_estimator_leaves_the_objective_alone() -> None:
    n = Networks()
    data, loss, other = n.start(), n.loss(deterministic=True), n.loss(deterministic=True)
    other.make_value_estimator(ValueEstimators.TDLambda, gamma=0.5)
    (out, imagined), (same, changed) = loss.rollout_and_loss(data), other.rollout_and_loss(data)
    assert torch.equal(out["loss_actor"], same["loss_actor"])
    assert not torch.allclose(imagined["value_target"], changed["value_target"])
