"""What PWMActorLoss computes; that it is a LossModule like TorchRL's is checked in ``conformity``."""

from __future__ import annotations

import pytest
import torch
from objective_cases import DIMS, FLOW, A, B, D, H, Networks, gradients, no_gradients
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from pwm_torchrl.modules import actor_module, value_module, world_model_module
from pwm_torchrl.objectives import PWMActorLoss, PWMValueLoss, td_lambda_targets

METRICS = ["imagined_return", "imagined_reward", "return_std", "terminated"]


def by_hand(n: Networks, data: TensorDict, horizon: int, gamma: float, noise: Tensor | None, detach: bool) -> Tensor:
    """J of every rollout, in one loop."""
    z, task, alive, j = data["latent"], data.get("task"), 1.0, 0.0
    for t in range(horizon):
        mean = n.actor.net(z.detach() if detach else z)
        a = torch.tanh(mean if noise is None else mean + n.actor.log_std.clamp(min=-1.427).exp() * noise[t])
        if task is not None:
            a = a * n.model.task.mask(task)
        z, r, end = n.model(z, a, task)
        j = j + gamma**t * alive * r
        alive = alive * (~end).to(r.dtype)
    return j + gamma**horizon * alive * n.critics(z).amin(0)


class TestPWMActorLoss:
    @pytest.mark.parametrize("tasks", [False, True])
    @pytest.mark.parametrize("detach", [False, True])
    @pytest.mark.parametrize("horizon", [1, 4])
    @pytest.mark.parametrize("options", [{}, {"termination": True, "dynamics": FLOW}], ids=["mlp", "flow"])
    def test_forward_and_gradient_against_a_loop(self, tasks: bool, detach: bool, horizon: int, options: dict) -> None:
        n = Networks(tasks, torch.float64, **options)
        data, loss = n.start(), n.loss(horizon=horizon, gamma=0.9, detach=detach, deterministic=True)
        out = loss(data)
        j = by_hand(n, data, horizon, 0.9, None, detach)
        torch.testing.assert_close(out["loss_actor"], -j.mean() / horizon)
        torch.testing.assert_close(out["imagined_return"], j.mean().detach())
        torch.testing.assert_close(out["return_std"], j.std(unbiased=False).detach())
        for ours, expected in zip(
            gradients(out["loss_actor"], n.actor.net), gradients(-j.mean() / horizon, n.actor.net), strict=True
        ):
            assert expected.abs().max() > 0
            torch.testing.assert_close(ours, expected)

    def test_noise_is_reparameterised(self) -> None:
        n = Networks(dtype=torch.float64)
        data, loss = n.start(), n.loss()
        torch.manual_seed(3)
        actual = loss(data)["loss_actor"]
        torch.manual_seed(3)
        noise = torch.randn(H, B, A, dtype=torch.float64)
        expected = -by_hand(n, data, H, 0.99, noise, True).mean() / H
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(gradients(actual, n.actor), gradients(expected, n.actor), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.abs().max() > 0, "the log-std learns, too"

    def test_noise_is_drawn_in_forward_unless_deterministic(self) -> None:
        """TorchRL's LossModule forces deterministic exploration inside forward; the noise is not affected."""
        n = Networks()
        data = n.start()
        stochastic, deterministic = n.loss(), n.loss(deterministic=True)
        assert not torch.equal(stochastic(data)["loss_actor"], stochastic(data)["loss_actor"])
        assert torch.equal(deterministic(data)["loss_actor"], deterministic(data)["loss_actor"])

    def test_only_the_actor_gets_gradients(self) -> None:
        n = Networks(True, reward_head="two_hot", termination=True, dynamics=FLOW)
        data = n.start()
        data["latent"] = data["latent"].clone().requires_grad_()
        for p in list(n.model.parameters())[::2]:  # partly frozen stays partly frozen
            p.requires_grad_(False)
        before = [p.requires_grad for p in n.model.parameters()]
        for detach in (True, False):
            loss = n.loss(detach=detach)
            assert {id(p) for p in loss.parameters()} == {id(p) for p in n.actor.parameters()}
            loss(data)["loss_actor"].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in n.actor.parameters())
        assert no_gradients(n.model, n.critics)
        assert data["latent"].grad is None
        assert [p.requires_grad for p in n.model.parameters()] == before
        assert all(p.requires_grad for p in n.critics.parameters())

    @pytest.mark.parametrize("normalize", [False, True])
    def test_out_keys_and_detached_metrics(self, normalize: bool) -> None:
        loss = Networks().loss(normalize_returns=normalize)
        losses, rollout = loss.rollout_and_loss(Networks().start())
        assert list(losses.keys()) == loss.out_keys == ["loss_actor", *METRICS]
        assert losses["loss_actor"].requires_grad
        for tensor in [losses[k] for k in METRICS] + list(rollout.values(True, True)):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
        assert not any(b.requires_grad for b in loss.buffers())

    def test_rollout_is_what_critics_learn_from(self) -> None:
        n = Networks(termination=True)
        data, loss = n.start(), n.loss(deterministic=True, gamma=0.9, lmbda=0.7)
        _, rollout = loss.rollout_and_loss(data)
        assert rollout.shape == (B, H)
        assert set(rollout.keys(True, True)) == {
            "latent", "action", "value_target", ("next", "reward"), ("next", "terminated"), ("next", "state_value"),
            ("collector", "mask"),
        }  # fmt: skip
        assert torch.equal(rollout["latent"][:, 0], data["latent"])
        next_z, r, end = n.model(rollout["latent"], rollout["action"])
        torch.testing.assert_close(rollout["latent"][:, 1:], next_z[:, :-1])
        torch.testing.assert_close(rollout["next", "reward"], r)
        torch.testing.assert_close(rollout["next", "state_value"], n.critics.value(next_z))
        assert torch.equal(rollout["next", "terminated"], end)
        major = rollout.transpose(0, 1)["next"]
        targets = td_lambda_targets(major["reward"], major["state_value"], major["terminated"], 0.9, 0.7)
        torch.testing.assert_close(rollout["value_target"], targets.transpose(0, 1))
        ended = end.int().cumsum(1) - end.int()
        assert torch.equal(rollout["collector", "mask"], ended == 0)
        PWMValueLoss(n.critics)(rollout)["loss_value"].backward()
        assert not no_gradients(n.critics)
        assert no_gradients(n.model, n.actor)

    def test_nested_keys(self) -> None:
        n = Networks(True, termination=True)
        data = n.start()
        z, task = data["latent"], data["task"]
        expected, expected_rollout = n.loss(deterministic=True).rollout_and_loss(data)
        keys = {"latent": ("s", "z"), "action": ("s", "a"), "reward": ("s", "r"), "terminated": ("s", "end"),
                "state_value": ("v", "min"), "value_target": ("v", "target"), "loc": ("p", "m"), "scale": ("p", "std"),
                "task": ("i", "task")}  # fmt: skip
        actor = TensorDictModule(n.actor, in_keys=[("s", "z")], out_keys=[("p", "m"), ("p", "std")])
        model = world_model_module(
            n.model, latent=("s", "z"), action=("s", "a"), task=("i", "task"), next_latent=("next", "s", "z"),
            reward=("next", "s", "r"), terminated=("next", "s", "end"),
        )  # fmt: skip
        value = value_module(n.critics, latent=("s", "z"), state_value=("v", "min"))
        loss = PWMActorLoss(actor, model, value, horizon=H, deterministic=True, action_mask=n.model.task.action_mask)
        loss.set_keys(**keys)
        assert loss.in_keys == [("s", "z"), ("i", "task")]
        out, rollout = loss.rollout_and_loss(TensorDict({"s": {"z": z}, "i": {"task": task}}, [B]))
        assert all(torch.equal(out[k], expected[k]) for k in expected.keys())
        assert torch.equal(rollout["v", "target"], expected_rollout["value_target"])
        assert torch.equal(rollout["next", "s", "r"], expected_rollout["next", "reward"])
        assert torch.equal(rollout["next", "v", "min"], expected_rollout["next", "state_value"])

    def test_keys_that_do_not_fit_are_one_clear_sentence(self) -> None:
        n = Networks()
        loss = PWMActorLoss(
            actor_module(n.actor, latent="z"), world_model_module(n.model), value_module(n.critics), horizon=H
        )
        with pytest.raises(ValueError, match=r"reads \['z'\] .* set_keys"):
            loss(n.start())

    def test_return_normalisation_uses_the_running_variance(self) -> None:
        n = Networks()
        loss, plain, seen = n.loss(normalize_returns=True, deterministic=True), n.loss(deterministic=True), []
        for _ in range(3):
            data = n.start()
            j = by_hand(n, data, H, 0.99, None, True)
            seen.append(j.detach())
            out = loss(data)["loss_actor"]
            # updated with this batch first, over all so far and the initial 1e-4 samples of mean 0 and variance 1
            x, count = torch.cat(seen).double(), 1e-4
            total = len(x) + count
            var = (x.square().sum() + count) / total - (x.sum() / total) ** 2
            torch.testing.assert_close(out, (-j.mean() / (var + 1e-5).sqrt()).float(), rtol=1e-4, atol=1e-6)
            scale = (loss.return_statistics.var + 1e-5).sqrt()
            # stop-gradient: the gradient is that of the plain loss, rescaled
            for ours, other in zip(
                gradients(out, n.actor.net), gradients(plain(data)["loss_actor"], n.actor.net), strict=True
            ):
                torch.testing.assert_close(ours, other * H / scale)

    def test_padding_actions_are_zero_and_train_nothing(self) -> None:
        n = Networks(True)
        data, loss = n.start(), n.loss()
        data["task"] = torch.full((B,), 1)  # one action dimension
        losses, rollout = loss.rollout_and_loss(data)
        assert rollout["action"][..., DIMS[1] :].abs().max() == 0
        assert rollout["action"][..., : DIMS[1]].abs().min() > 0
        weight, bias = gradients(losses["loss_actor"], n.actor.net[-1])
        assert bias[0] != 0
        assert bias[DIMS[1] :].abs().max() == weight[DIMS[1] :].abs().max() == 0

    @pytest.mark.parametrize("shape", [(B, H, D), (D,)])
    def test_wrong_start_states_raise(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"latent has shape"):
            Networks().loss()(TensorDict(latent=torch.rand(shape), batch_size=shape[:1]))

    @pytest.mark.parametrize("horizon", [0, -1])
    def test_horizon_below_one_raises(self, horizon: int) -> None:
        with pytest.raises(ValueError, match=f"horizon={horizon} must be at least 1"):
            Networks().loss(horizon=horizon)
