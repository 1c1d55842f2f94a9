"""What PWMValueLoss computes; that it is a LossModule like TorchRL's is checked in ``conformity``."""

from __future__ import annotations

import pytest
import torch
from objective_cases import B, D, H, randomized
from tensordict import TensorDict

from pwm_torchrl.modules import CriticEnsemble
from pwm_torchrl.objectives import PWMValueLoss


def critics() -> CriticEnsemble:
    return randomized(CriticEnsemble(D, [10]))


def data(*size: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    return TensorDict(
        latent=torch.rand(*size, D, dtype=dtype), value_target=torch.randn(*size, 1, dtype=dtype), batch_size=size
    )


class TestPWMValueLoss:
    @pytest.mark.parametrize("size", [(B,), (B, H)])
    def test_forward_is_the_mean_over_members_and_states(self, size: tuple[int, ...]) -> None:
        net, batch = critics(), data(*size)
        out = PWMValueLoss(net)(batch)
        expected = torch.stack([(v - batch["value_target"]) ** 2 for v in net(batch["latent"])]).mean()
        torch.testing.assert_close(out["loss_value"], expected)
        torch.testing.assert_close(out["value"], net(batch["latent"]).mean())

    def test_states_after_the_end_of_a_rollout_are_left_out(self) -> None:
        net, batch = critics(), data(B, H)
        loss, mask = PWMValueLoss(net), torch.rand(B, H, 1) < 0.6
        mask[0, 0], mask[1, 1] = True, False
        batch["collector", "mask"] = mask
        reference = (net(batch["latent"])[:, mask.squeeze(-1)] - batch["value_target"][mask.squeeze(-1)]) ** 2
        torch.testing.assert_close(loss(batch)["loss_value"], reference.mean())
        changed = batch.clone()
        changed["value_target"][~mask] = float("nan")
        assert torch.equal(loss(changed)["loss_value"], loss(batch)["loss_value"])

    @pytest.mark.parametrize("shape", [(B,), (B, 2), (B, 1, 1), (B, B)])
    def test_wrong_targets_raise(self, shape: tuple[int, ...]) -> None:
        batch = data(B)
        batch["value_target"] = torch.zeros(shape)
        with pytest.raises(ValueError, match="nothing is broadcast"):
            PWMValueLoss(critics())(batch)

    def test_flat_batches_of_latents_and_targets_raise(self) -> None:
        batch = TensorDict(latent=torch.rand(B, H, D), value_target=torch.rand(B, H), batch_size=[B, H])
        with pytest.raises(ValueError, match="nothing is broadcast"):
            PWMValueLoss(critics())(batch)

    def test_gradients_in_double_precision(self) -> None:
        net, batch = critics().double(), data(B, dtype=torch.float64)
        loss, names = PWMValueLoss(net), [n for n, _ in net.named_parameters()]

        def value(*parameters: torch.Tensor) -> torch.Tensor:
            values = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), batch["latent"])
            return ((values - batch["value_target"]) ** 2).mean()

        parameters = list(net.parameters())
        assert torch.autograd.gradcheck(value, parameters)
        ours = torch.autograd.grad(loss(batch)["loss_value"], parameters)
        for g, expected in zip(ours, torch.autograd.grad(value(*parameters), parameters), strict=True):
            torch.testing.assert_close(g, expected)
