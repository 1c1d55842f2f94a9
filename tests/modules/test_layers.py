"""Layers: SimNorm, NormedLinear and the two kinds of MLP."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import Encoder, NormedLinear, SimNorm, WorldModelSpec, make_world_model
from pwm_torchrl.modules.layers import cat_features, init_critic_weights, normed_mlp, policy_mlp


@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e8]),
    seed=st.integers(0, 99),
)
def test_simnorm_gives_points_of_the_simplex(groups: int, size: int, scale: float, seed: int) -> None:
    x = scale * torch.randn(3, groups * size, generator=torch.Generator().manual_seed(seed))
    y = SimNorm(size)(x).unflatten(-1, (groups, size))
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(3, groups))


def test_simnorm_is_a_softmax_of_neighbouring_features() -> None:
    x = torch.randn(2, 8)
    expected = torch.cat([x[:, :4].softmax(-1), x[:, 4:].softmax(-1)], -1)
    torch.testing.assert_close(SimNorm(4)(x), expected)


@pytest.mark.parametrize(("latent", "group"), [(12, 8), (16, 0), (16, -8)])
def test_simnorm_that_does_not_divide_the_latent_is_one_clear_sentence(latent: int, group: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"size\.latent_dim={latent} .*size\.simnorm_dim={group}"):
        make_world_model(WorldModelSpec(3, 1, latent, [8], [8], simnorm_dim=group))


def test_normed_linear_is_linear_layernorm_mish() -> None:
    layer, x = NormedLinear(5, 7), torch.randn(4, 5)
    expected = nn.functional.mish(nn.functional.layer_norm(x @ layer.weight.T + layer.bias, (7,)))
    torch.testing.assert_close(layer(x), expected)
    assert sorted(layer.state_dict()) == ["bias", "ln.bias", "ln.weight", "weight"]


def test_world_model_initialisation() -> None:
    net = normed_mlp(300, [400], 500, None)
    for layer in net:
        assert layer.bias.abs().max() == 0
        assert 0.018 < layer.weight.std() < 0.022
    model = make_world_model(WorldModelSpec(3, 1, 16, [8], [8], num_tasks=50, task_dim=20, action_dims=[1] * 50))
    assert 0.015 < model.task.embedding.weight.abs().max() <= 0.02
    assert model.reward.net[-1].weight.abs().max() == 0


def test_policy_mlp_is_linear_mish_layernorm_with_orthogonal_weights_in_critics() -> None:
    net = policy_mlp(6, [5, 4], 2)
    kinds = [nn.Linear, nn.Mish, nn.LayerNorm, nn.Linear, nn.Mish, nn.LayerNorm, nn.Linear]
    assert all(isinstance(layer, kind) for layer, kind in zip(net, kinds, strict=True))
    x = torch.randn(3, 6)
    one_by_one = x
    for layer in net:
        one_by_one = layer(one_by_one)
    torch.testing.assert_close(net(x), one_by_one)
    init_critic_weights(net)
    assert not net[-1].weight.any()
    weight = net[3].weight.detach()
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(4))
    assert all(m.bias.abs().max() == 0 for m in net if isinstance(m, nn.Linear))


def test_encoder_concatenates_observation_and_task() -> None:
    encoder = Encoder(3, 2, [8], 16)
    o, e = torch.randn(4, 5, 3), torch.randn(5, 2)
    together = encoder(o, e)
    assert together.shape == (4, 5, 16)
    torch.testing.assert_close(together, encoder.net(torch.cat([o, e.expand(4, 5, 2)], -1)))


def test_cat_features_skips_none_and_broadcasts_later_parts_only() -> None:
    assert cat_features(torch.zeros(2, 3, 4), None, torch.zeros(3, 1)).shape == (2, 3, 5)
    with pytest.raises(RuntimeError):
        cat_features(torch.zeros(3, 4), torch.zeros(2, 3, 1))
