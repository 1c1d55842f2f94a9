"""The two-hot codec and the reward and termination heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import ScalarRewardHead, TerminationHead, TwoHotCodec, TwoHotRewardHead, symexp, symlog

LIMIT = math.expm1(10.0)  # the end bins in raw space


@given(st.floats(-1e6, 1e6, width=32))
def test_symexp_inverts_symlog(x: float) -> None:
    value = torch.tensor(x)
    torch.testing.assert_close(symexp(symlog(value)), value, rtol=1e-5, atol=1e-6)


def test_symlog_values() -> None:
    x = torch.tensor([-(math.e**3 - 1), 0.0, math.e - 1])
    torch.testing.assert_close(symlog(x), torch.tensor([-3.0, 0.0, 1.0]))


@given(x=st.floats(-1e5, 1e5, width=32), bins=st.integers(2, 130))
def test_two_hot_round_trip(x: float, bins: int) -> None:
    codec, value = TwoHotCodec(bins), torch.tensor([[x]], dtype=torch.float64)
    code = codec.encode(value)
    assert code.shape == (1, bins)
    assert (code >= 0).all()
    assert (code > 0).sum() <= 2
    hot = code[0].nonzero().flatten()
    assert hot[-1] - hot[0] <= 1, "the two bins are neighbours"
    torch.testing.assert_close(code.sum(), torch.ones((), dtype=torch.float64))
    # the expectation of the code is the value, in symlog space, up to the ends
    expected = symlog(value).clamp(-10, 10)
    decoded = (code * torch.linspace(-10, 10, bins, dtype=torch.float64)).sum(-1, keepdim=True)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)


@given(st.floats(-21_000, 21_000, width=32))
def test_decoding_the_logarithm_of_a_code_gives_the_value_back(x: float) -> None:
    codec, value = TwoHotCodec().double(), torch.tensor([[x]], dtype=torch.float64)
    logits = codec.encode(value).clamp_min(1e-30).log()
    torch.testing.assert_close(codec.decode(logits, "raw"), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(logits, "symlog"), symlog(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("x", "index"), [(-1e9, 0), (-LIMIT, 0), (LIMIT * 1.001, 100), (1e9, 100), (0.0, 50)])
def test_values_at_and_beyond_the_ends_use_one_bin(x: float, index: int) -> None:
    code = TwoHotCodec().encode(torch.tensor([[x]]))
    torch.testing.assert_close(code, torch.nn.functional.one_hot(torch.tensor([index]), 101).float(), rtol=0, atol=1e-4)


def test_the_expectation_is_taken_before_symexp() -> None:
    codec, logits = TwoHotCodec(3, -2.0, 2.0), torch.tensor([[0.0, 0.0, math.log(2.0)]])
    torch.testing.assert_close(codec.decode(logits, "symlog"), torch.tensor([[0.5]]))
    torch.testing.assert_close(codec.decode(logits, "raw"), torch.tensor([[math.expm1(0.5)]]))


def test_cross_entropy_against_a_written_out_sum() -> None:
    codec, logits, x = TwoHotCodec(11, -5, 5), torch.randn(4, 3, 11), 3 * torch.randn(4, 3, 1)
    expected = -(codec.encode(x) * logits.softmax(-1).log()).sum(-1, keepdim=True)
    torch.testing.assert_close(codec.cross_entropy(logits, x), expected)
    best = codec.encode(x).clamp_min(1e-30).log()
    assert (codec.cross_entropy(best, x) <= expected).all(), "the code itself minimises it"


@pytest.mark.parametrize("kwargs", [{"num_bins": 1}, {"vmin": 1.0, "vmax": 1.0}, {"vmin": 2.0, "vmax": -2.0}])
def test_impossible_codecs_are_refused(kwargs: dict) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.num_bins"):
        TwoHotCodec(**kwargs)


def test_unknown_reward_space_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.reward_space='log'.*raw, symlog"):
        TwoHotRewardHead(3, [4], space="log")


@pytest.mark.parametrize("space", ["raw", "symlog"])
def test_two_hot_head_learns_a_known_reward(space: str) -> None:
    """What counts is the decoded reward and its gradient to the action, not how small the loss looks."""
    torch.manual_seed(0)
    head = TwoHotRewardHead(6, [64], space=space)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z, a = torch.rand(n, 4), 2 * torch.rand(n, 2) - 1
        return z, a, 3 * a[:, :1] - z[:, :1]

    for _ in range(300):
        z, a, reward = data(256)
        optimizer.zero_grad()
        head.loss(head(z, a), reward).mean().backward()
        optimizer.step()
    z, a, reward = data(512)
    a.requires_grad_()
    decoded = head.decode(head(z, a))
    raw = decoded if space == "raw" else symexp(decoded)
    assert (raw - reward).square().mean() < 0.02 * reward.var()
    gradient = torch.autograd.grad(raw.sum(), a)[0].mean(0)
    assert abs(gradient[0] - 3) < 0.5
    assert abs(gradient[1]) < 0.3


def test_heads_start_at_zero_reward() -> None:
    z, a = torch.rand(5, 8), torch.rand(5, 2)
    for head in (ScalarRewardHead(10, [16]), TwoHotRewardHead(10, [16])):
        torch.testing.assert_close(head.decode(head(z, a)), torch.zeros(5, 1), rtol=0, atol=1e-5)


def test_scalar_head_is_the_reward_and_its_squared_error() -> None:
    head, logits, r = ScalarRewardHead(3, [4]), torch.randn(5, 1), torch.randn(5, 1)
    assert head.decode(logits) is logits
    torch.testing.assert_close(head.loss(logits, r), (logits - r) ** 2)


def test_termination_head() -> None:
    head = TerminationHead(6, [8], threshold=0.5)
    logit = torch.tensor([[-1.0], [0.0], [2.0]], requires_grad=True)
    ended = head.terminated(logit)
    assert ended.flatten().tolist() == [False, True, True]
    assert not ended.requires_grad
    target = torch.tensor([[True], [False], [True]])
    p = logit.sigmoid()
    torch.testing.assert_close(head.loss(logit, target), -torch.where(target, p, 1 - p).log())
    assert head(torch.rand(3, 4), torch.rand(3, 2)).shape == (3, 1)
