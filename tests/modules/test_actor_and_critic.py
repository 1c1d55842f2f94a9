"""Actor, critic ensemble and running statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    PinkNoise,
    RewardScale,
    RunningStatistics,
    WorldModelSpec,
    exploring_policy_module,
    make_world_model,
)
from pwm_torchrl.modules.layers import policy_mlp


class TestPinkNoise:
    def test_every_step_is_standard_normal_and_the_spectrum_falls_like_one_over_the_frequency(self) -> None:
        torch.manual_seed(0)
        noise = PinkNoise(64, 2)
        steps = torch.stack([noise() for _ in range(4096)])
        assert abs(steps.mean()) < 0.05
        assert abs(steps.std() - 1) < 0.03
        assert abs(steps[::1024].std() - 1) < 0.1  # from the first step on
        power = torch.fft.rfft(steps, dim=0).abs().square().mean((1, 2))[1:]
        frequency = torch.fft.rfftfreq(4096)[1:]
        between = (frequency > 1 / 1000) & (frequency < 1 / 5)
        x, y = frequency[between].log(), power[between].log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        assert abs(slope + 1) < 0.1

    def test_environments_and_dimensions_are_independent(self) -> None:
        torch.manual_seed(0)
        noise = PinkNoise(2, 2)
        steps = torch.stack([noise().flatten() for _ in range(20_000)], 1)
        assert (torch.corrcoef(steps) - torch.eye(4)).abs().max() < 0.2

    def test_the_policy_acts_with_it_as_the_actor_does_with_noise(self) -> None:
        torch.manual_seed(0)
        model = make_world_model(WorldModelSpec(3, 1, latent_dim=8, units=[8], encoder_units=[8]))
        actor, noise = Actor(8, 1, [16]), PinkNoise(5, 1)
        policy = exploring_policy_module(model, actor, noise)
        observation, before = torch.randn(5, 3), noise.state.clone()
        torch.manual_seed(1)
        found = policy(TensorDict(observation=observation, batch_size=[5]))["action"]
        noise.state.copy_(before)
        torch.manual_seed(1)
        assert torch.equal(found, actor.act(model.encode(observation), noise()))


class TestActor:
    def test_deterministic_action_is_tanh_of_the_mean(self) -> None:
        actor, z = Actor(8, 3, [16]), torch.rand(2, 5, 8)
        assert torch.equal(actor.act(z), actor.net(z).tanh())
        assert actor.act(z).shape == (2, 5, 3)

    def test_noise_is_scaled_by_the_standard_deviation(self) -> None:
        actor, z, noise = Actor(8, 3, [16]), torch.rand(5, 8), torch.randn(5, 3)
        assert torch.equal(actor.act(z, noise), torch.tanh(actor.net(z) + math.exp(-1) * noise))
        assert torch.equal(actor.act(z, torch.zeros(5, 3)), actor.act(z))

    def test_log_std_starts_at_minus_one_and_has_a_floor(self) -> None:
        actor, z = Actor(8, 3, [16]), torch.rand(5, 8)
        torch.testing.assert_close(actor(z)[1], torch.full((5, 3), math.exp(-1)))
        with torch.no_grad():
            actor.log_std.copy_(torch.tensor([-5.0, -1.2, 0.3]))
        actor(z)[1].sum().backward()
        assert (actor.log_std.grad != 0).all()  # below the floor, too
        actor.keep_std()
        expected = torch.tensor([-1.427, -1.2, 0.3]).exp().expand(5, 3)
        torch.testing.assert_close(actor(z)[1], expected)

    @pytest.mark.parametrize("state_std", [False, True])
    def test_actions_begin_near_zero_with_the_initial_deviation(self, state_std: bool) -> None:
        mean, std = Actor(8, 3, [16], state_std=state_std)(torch.rand(50, 8))
        assert mean.abs().max() < 0.05
        torch.testing.assert_close(std, torch.full((50, 3), math.exp(-1)), rtol=0.1, atol=0)

    def test_a_predicted_std_depends_on_the_state_and_stays_in_its_range(self) -> None:
        actor = Actor(8, 3, [16], state_std=True)
        with torch.no_grad():
            actor.net[-1].weight.mul_(1e5)
        std = actor(torch.randn(50, 8))[1]
        assert std.std(0).min() > 0
        assert std.min() >= math.exp(-5.001)
        assert std.max() <= math.exp(2.001)

    def test_std_does_not_depend_on_the_state(self) -> None:
        actor = Actor(8, 3, [16])
        assert torch.equal(actor(torch.rand(5, 8))[1], actor(torch.rand(5, 8))[1])

    def test_default_widths(self) -> None:
        shapes = [tuple(p.shape) for p in Actor(64, 2).net.parameters() if p.ndim == 2]
        assert shapes == [(400, 64), (200, 400), (100, 200), (2, 100)]

    def test_reset_parameters_is_as_built(self) -> None:
        actor = Actor(8, 3, [16], log_std_init=-0.5)
        with torch.no_grad():
            for p in actor.parameters():
                p.add_(1000)
        actor.reset_parameters()
        assert (actor.log_std == -0.5).all()
        weight, _, scale, shift, last, last_bias = actor.net.parameters()
        assert 0.3 < weight.abs().max() <= 8**-0.5
        assert last.abs().max() <= 0.01 * 16**-0.5
        assert (scale == 1).all()
        assert not any(p.any() for p in (shift, last_bias))


class TestCriticEnsemble:
    def members(self, critics: CriticEnsemble, latent_dim: int, units: list[int]) -> list[torch.nn.Module]:
        nets = []
        for k in range(critics.num_critics):
            net = policy_mlp(latent_dim, units, 1)
            with torch.no_grad():
                for ours, theirs in zip(net.parameters(), critics.params, strict=True):
                    ours.copy_(theirs[k])
            nets.append(net)
        return nets

    def test_reset_parameters_is_as_built(self) -> None:
        critics = CriticEnsemble(8, [16], num_critics=2)
        with torch.no_grad():
            for p in critics.parameters():
                p.add_(1000)
        before = list(critics.parameters())
        critics.reset_parameters()
        assert all(a is b for a, b in zip(before, critics.parameters(), strict=True))
        weight, bias, scale, shift, _, last_bias = critics.params
        torch.testing.assert_close(weight.mT @ weight, 2 * torch.eye(8).expand(2, 8, 8))
        assert not torch.equal(weight[0], weight[1])
        assert (scale == 1).all()
        assert not any(p.any() for p in (bias, shift, last_bias))

    def test_one_by_one_gives_the_same_values(self) -> None:
        critics, z = CriticEnsemble(8, [16, 12], num_critics=4), torch.rand(3, 5, 8)
        torch.testing.assert_close(critics.one_by_one(z), critics(z))

    @pytest.mark.parametrize("units", [[], [16], [16, 12]])
    def test_equals_separate_mlps(self, units: list[int]) -> None:
        critics, z = CriticEnsemble(8, units, num_critics=4), torch.rand(3, 5, 8)
        with torch.no_grad():
            for p in critics.params:
                p.add_(0.3 * torch.randn_like(p))
        expected = torch.stack([net(z) for net in self.members(critics, 8, units)])
        assert expected.shape == (4, 3, 5, 1)
        torch.testing.assert_close(critics(z), expected)
        torch.testing.assert_close(critics.value(z), expected.min(0).values)

    def test_gradients_equal_those_of_separate_mlps(self) -> None:
        critics, z = CriticEnsemble(8, [16, 12]), torch.rand(5, 8)
        nets = self.members(critics, 8, [16, 12])
        critics(z).square().sum().backward()
        sum(net(z).square().sum() for net in nets).backward()
        for ours, *theirs in zip(critics.params, *(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(ours.grad, torch.stack([p.grad for p in theirs]))

    def test_members_differ(self) -> None:
        critics = CriticEnsemble(8)
        values = critics(torch.rand(5, 8))
        assert values.shape == (3, 5, 1)
        assert not values.any()  # before training; their hidden layers differ
        assert critics.params[0].std(0).min() > 0

    def test_of_actions(self) -> None:
        critics = CriticEnsemble(8, [16], 2, action_dim=3)
        with torch.no_grad():
            critics.params[-2].normal_()
        z, a = torch.rand(5, 8), torch.rand(5, 3, requires_grad=True)
        critics.value(z, a).sum().backward()
        assert a.grad is not None
        assert a.grad.abs().min(0).values.max() > 0
        with pytest.raises(ValueError, match="action_dim=3"):
            critics(z)
        with pytest.raises(ValueError, match="action_dim=0"):
            CriticEnsemble(8)(z, a)

    def test_a_new_unit_changes_no_value(self) -> None:
        critics, z = CriticEnsemble(8, [16], 2, scaled=True), torch.rand(5, 8)
        with torch.no_grad():
            critics.params[-2].normal_()
            critics.params[-1].normal_()
        before = critics(z)
        critics.rescale(torch.tensor([0.1]))
        torch.testing.assert_close(critics(z), before)
        assert critics.scale == 0.1


class TestRunningStatistics:
    @pytest.mark.parametrize("sizes", [[5], [1, 2, 30], [7, 7, 7, 7]])
    def test_agrees_with_numpy_over_batches(self, sizes: list[int]) -> None:
        rng = np.random.default_rng(0)
        batches = [rng.normal(3.0, 2.0, (n, 4)) for n in sizes]
        statistics = RunningStatistics((4,), epsilon=1e-9).double()
        for batch in batches:
            statistics.update(torch.from_numpy(batch))
        seen = np.concatenate(batches)
        np.testing.assert_allclose(statistics.mean.numpy(), seen.mean(0), rtol=1e-6)
        np.testing.assert_allclose(statistics.var.numpy(), seen.var(0), rtol=1e-6, atol=1e-6)

    def test_initial_count_weighs_in(self) -> None:
        """Count 1e-4, mean 0, variance 1 and one batch, pooled by hand."""
        x = torch.tensor([[1.0], [2.0], [6.0]])
        statistics = RunningStatistics()
        statistics.update(x)
        c, n, m, v = 1e-4, 3, 3.0, 14 / 3
        mean = m * n / (n + c)
        var = (c * 1 + n * v + m**2 * c * n / (n + c)) / (n + c)
        torch.testing.assert_close(statistics.mean, torch.tensor([mean]))
        torch.testing.assert_close(statistics.var, torch.tensor([var]))

    def test_normalize_and_leading_dimensions(self) -> None:
        statistics, x = RunningStatistics((4,)), 5 + 3 * torch.randn(10, 20, 4)
        statistics.update(x)
        y = statistics.normalize(x).reshape(-1, 4)
        torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(y.std(0), torch.ones(4), atol=1e-2, rtol=0)

    def test_set_forgets(self) -> None:
        statistics, x = RunningStatistics((4,)), 5 + 3 * torch.randn(200, 4)
        statistics.update(torch.randn(10, 4) * 100)
        statistics.set(x)
        torch.testing.assert_close(statistics.mean, x.mean(0))
        torch.testing.assert_close(statistics.var, x.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
        assert statistics.count == pytest.approx(200, abs=1e-3)

    def test_update_keeps_no_graph(self) -> None:
        statistics, x = RunningStatistics(), torch.randn(5, 1, requires_grad=True)
        statistics.update(x)
        assert not statistics.mean.requires_grad
        assert not statistics.var.requires_grad

    def test_state_dict_round_trip(self) -> None:
        a, b = RunningStatistics(), RunningStatistics()
        a.update(torch.randn(5, 1))
        b.load_state_dict(a.state_dict())
        x = torch.randn(6, 1)
        a.update(x)
        b.update(x)
        assert torch.equal(a.var, b.var)
        assert a.count == b.count


class TestRewardScale:
    def test_scales_by_the_spread_of_discounted_returns(self) -> None:
        scale = RewardScale(2, gamma=0.5)
        reward = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 1.0]]).unsqueeze(-1)
        done = torch.tensor([[False, True, False], [False, False, False]]).unsqueeze(-1)
        scale.update(reward, done)
        returns = torch.tensor([1.0, 2.5, 4.0, 0.0, -1.0, 0.5])
        torch.testing.assert_close(scale(torch.ones(1)), 1 / returns.var(0, False, True).sqrt(), rtol=1e-3, atol=0)

    def test_never_shifts(self) -> None:
        scale = RewardScale(4)
        scale.update(7 + torch.randn(4, 50, 1), torch.zeros(4, 50, 1, dtype=torch.bool))
        assert scale(torch.zeros(3, 1)).abs().max() == 0
        r = torch.tensor([[-2.0], [1.0], [5.0]])
        torch.testing.assert_close(scale(2 * r), 2 * scale(r))
        assert (scale(r).sign() == r.sign()).all()

    def test_continues_over_calls(self) -> None:
        reward, done = torch.randn(3, 8, 1), torch.rand(3, 8, 1) < 0.2
        whole, parts = RewardScale(3), RewardScale(3)
        whole.update(reward, done)
        parts.update(reward[:, :5], done[:, :5])
        parts.update(reward[:, 5:], done[:, 5:])
        torch.testing.assert_close(whole.statistics.var, parts.statistics.var)
        torch.testing.assert_close(whole.returns, parts.returns)
