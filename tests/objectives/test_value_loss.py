"""PWMValueLoss as a LossModule."""

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

    def test_out_keys_and_detached_metric(self) -> None:
        loss = PWMValueLoss(critics())
        out = loss(data(B))
        assert list(out.keys()) == loss.out_keys == ["loss_value", "value"]
        assert out["loss_value"].requires_grad
        assert not out["value"].requires_grad
        assert out["value"].grad_fn is None

    def test_only_the_critics_get_gradients(self) -> None:
        net, batch = critics(), data(B)
        for key in ("latent", "value_target"):
            batch[key] = batch[key].clone().requires_grad_()
        loss = PWMValueLoss(net)
        assert {id(p) for p in loss.parameters()} == {id(p) for p in net.parameters()}
        loss(batch)["loss_value"].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
        assert batch["latent"].grad is None
        assert batch["value_target"].grad is None

    def test_nested_keys(self) -> None:
        net, batch = critics(), data(B)
        loss = PWMValueLoss(net)
        expected = loss(batch)["loss_value"]
        loss.set_keys(latent=("s", "z"), value_target=("t", "v"))
        assert loss.in_keys == [("s", "z"), ("t", "v")]
        nested = TensorDict({"s": {"z": batch["latent"]}, "t": {"v": batch["value_target"]}}, [B])
        assert torch.equal(loss(nested)["loss_value"], expected)

    def test_calling_with_tensors(self) -> None:
        loss, batch = PWMValueLoss(critics()), data(B)
        value, metric = loss(latent=batch["latent"], value_target=batch["value_target"])
        assert torch.equal(value, loss(batch)["loss_value"])
        assert torch.equal(metric, loss(batch)["value"])

    def test_state_dict_round_trip(self) -> None:
        first, second, batch = PWMValueLoss(critics()), PWMValueLoss(CriticEnsemble(D, [10])), data(B)
        assert not torch.equal(first(batch)["loss_value"], second(batch)["loss_value"])
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(batch)["loss_value"], second(batch)["loss_value"])

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
