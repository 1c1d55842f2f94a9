"""What PWMModelLoss computes; that it is a LossModule like TorchRL's is checked in ``conformity``."""

from __future__ import annotations

import pytest
import torch
from objective_cases import FLOW, OBS, A, B, H, no_gradients, slice_data, time_major, world_model
from tensordict import TensorDict

from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.objectives.model_loss import loss_weights, slice_losses

SHORTCUT = {**FLOW, "condition_on_step_size": True}


def total(losses: TensorDict) -> torch.Tensor:
    return sum(v for k, v in losses.items() if k.startswith("loss_"))


class TestPWMModelLoss:
    @pytest.mark.parametrize("tasks", [False, True])
    @pytest.mark.parametrize("head", ["scalar", "two_hot"])
    @pytest.mark.parametrize("form", ["pwm", "tdmpc2"])
    def test_forward_is_the_pure_function(self, tasks: bool, head: str, form: str) -> None:
        model, data = world_model(tasks, reward_head=head, termination=True), slice_data(tasks=tasks)
        data["next", "done"][2, 1] = True
        loss = PWMModelLoss(model, form=form, gamma=0.9)
        out = loss(data)
        expected = slice_losses(model, time_major(data), loss_weights(form, 0.9))
        assert set(out.keys()) == {"loss_dynamics", "loss_reward", "loss_termination"}
        for name in ("dynamics", "reward", "termination"):
            assert out[f"loss_{name}"].shape == ()
            torch.testing.assert_close(out[f"loss_{name}"], getattr(expected, name))

    @pytest.mark.parametrize(
        ("model", "options", "keys"),
        [
            ({}, {}, ["loss_dynamics", "loss_reward"]),
            ({"termination": True}, {}, ["loss_dynamics", "loss_reward", "loss_termination"]),
            ({"dynamics": FLOW}, {"flow_matching_weight": 1.0}, ["loss_dynamics", "loss_reward", "loss_flow_matching"]),
            (
                {"dynamics": SHORTCUT, "termination": True},
                {"flow_matching_weight": 1.0, "self_consistency_weight": 0.5},
                ["loss_dynamics", "loss_reward", "loss_termination", "loss_flow_matching", "loss_self_consistency"],
            ),
        ],
    )
    def test_out_keys_are_exact(self, model: dict, options: dict, keys: list[str]) -> None:
        loss = PWMModelLoss(world_model(**model), **options)
        assert loss.out_keys == keys
        assert list(loss(slice_data()).keys()) == keys

    def test_only_first_observation_feeds_the_encoder_with_gradient(self) -> None:
        model, data = world_model(), slice_data()
        for key in ("observation", ("next", "observation"), "action", ("next", "reward")):
            data[key] = data[key].clone().requires_grad_()
        total(PWMModelLoss(model)(data)).backward()
        gradient = data["observation"].grad
        assert gradient[:, 0].abs().max() > 0
        assert gradient[:, 1:].abs().max() == 0
        assert data["next", "observation"].grad is None

    def test_calling_with_tensors_of_one_feature(self) -> None:
        """Observation and action of width 1: the last dimension is not taken for a batch dimension."""
        from pwm_torchrl.modules import WorldModelSpec, make_world_model

        loss = PWMModelLoss(make_world_model(WorldModelSpec(1, 1, 16, [8], [8])))
        x, flags = torch.rand(B, H, 1), torch.zeros(B, H, 1, dtype=torch.bool)
        out = loss(observation=x, action=x, next_observation=x, next_reward=x, next_done=flags, next_terminated=flags)
        assert all(v.shape == () for v in out)

    def test_sees_updates_of_the_model(self) -> None:
        model, data = world_model(normalize_observations=True), slice_data()
        loss = PWMModelLoss(model)
        before = total(loss(data))
        model.observation_statistics.update(5 + 3 * torch.randn(100, OBS))
        normalized = total(loss(data))
        assert not torch.equal(before, normalized)
        with torch.no_grad():
            for p in loss.parameters():
                p.mul_(0.5)
        assert not torch.equal(total(loss(data)), normalized)
        expected = slice_losses(model, time_major(data), loss_weights("pwm", 0.99))
        torch.testing.assert_close(total(loss(data)), sum(expected))

    def test_mask_of_padded_slices(self) -> None:
        loss, data = PWMModelLoss(world_model()), slice_data()
        mask = torch.ones(B, H, dtype=torch.bool)
        mask[1, 3:] = mask[4, 1:] = False
        ended = data.clone()
        ended["next", "done"][1, 2] = ended["next", "done"][4, 0] = True
        for shape in ((B, H), (B, H, 1)):
            data["collector", "mask"] = mask.reshape(shape)
            assert torch.equal(total(loss(data)), total(loss(ended)))

    def test_all_steps_masked_is_zero_not_nan(self) -> None:
        data = slice_data()
        data["collector", "mask"] = torch.zeros(B, H, dtype=torch.bool)
        assert total(PWMModelLoss(world_model())(data)) == 0

    @pytest.mark.parametrize("key", ["reward", "done", "terminated"])
    @pytest.mark.parametrize("shape", [(B, H), (B, H, 2), (B, H, 1, 1)])
    def test_wrong_shapes_raise(self, key: str, shape: tuple[int, ...]) -> None:
        data = slice_data()
        data["next", key] = torch.zeros(shape, dtype=data["next", key].dtype)
        with pytest.raises(ValueError, match=rf"{key} has shape .* nothing is broadcast"):
            PWMModelLoss(world_model())(data)

    @pytest.mark.parametrize("size", [(B,), (B, H, 2), ()])
    def test_wrong_batch_size_raises(self, size: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"slices of batch size \[B, H\]"):
            PWMModelLoss(world_model())(TensorDict({}, size))

    def test_padding_actions_have_no_influence(self) -> None:
        model, data = world_model(True), slice_data(tasks=True)
        loss = PWMModelLoss(model)
        before = total(loss(data))
        padding = model.task.mask(data["task"]) == 0
        data["action"] = torch.where(padding, torch.tensor(7.0), data["action"])
        assert torch.equal(total(loss(data)), before)

    def test_leaves_no_gradient_before_backward(self) -> None:
        model = world_model()
        PWMModelLoss(model)(slice_data())
        assert no_gradients(model)
        assert model.mask_action(torch.ones(A)).shape == (A,)
