"""Packing of tensors into bytes, and the division of a batch into shares."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from pwm_torchrl.distributed.ranks import ALIGNMENT, Layout, Ranks


def payload_of(rows: int) -> TensorDict:
    """Tensors of every element size, a scalar, and an odd number of flags before tensors that need alignment."""
    content = TensorDict(
        flag=torch.rand(rows, 3, 1) < 0.5,
        observation=torch.randn(rows, 3, 5),
        next=TensorDict(reward=torch.randn(rows, 3, 1, dtype=torch.float64), index=torch.arange(rows)),
    )
    common = TensorDict(count=torch.tensor(7.5, dtype=torch.float64), per_step=torch.rand(3, 1, 1))
    return TensorDict(rows=content, common=common)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 4), slice(2, 2), slice(0, 5)])
def test_round_trip(rows):
    """A share has its rows and the common tensors; the receiver only knows the layout of the whole batch."""
    sent = payload_of(5)
    layout = Layout.of(sent)
    received_layout = Layout.from_json(json.loads(json.dumps(layout.as_json())))
    mine = layout.resized(rows.stop - rows.start)
    buffer = torch.full((mine.nbytes + 40,), 255, dtype=torch.uint8)  # as long as a larger share
    mine.pack(sent, rows, buffer)
    received = received_layout.resized(rows.stop - rows.start).unpack(buffer)
    assert set(received.keys(True, True)) == set(sent.keys(True, True))
    for key, value in sent.items(True, True):
        assert torch.equal(received[key], value[rows] if key[0] == "rows" else value), key
        assert received[key].dtype == value.dtype
    assert (buffer[mine.nbytes :] == 255).all()


def test_no_copy():
    sent = payload_of(2)
    layout = Layout.of(sent)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack(sent, slice(None), buffer)
    received = layout.unpack(buffer)
    buffer.zero_()
    assert not any(value.any() for value in received.values(True, True))


def test_aligned():
    layout = Layout.of(payload_of(3))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert layout.nbytes % ALIGNMENT == 0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 1024])
def test_shares_are_all_rows_once(count, size):
    ranks = SimpleNamespace(rank=0, size=size)
    shares = [Ranks.share(ranks, count, rank) for rank in range(size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths) == Ranks.largest_share(ranks, count)
