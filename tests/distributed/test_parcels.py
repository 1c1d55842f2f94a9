"""Tensors as bytes."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict

from pwm_torchrl.distributed.ranks import ALIGNMENT, Layout


def parcel(rows: int) -> TensorDict:
    """Of types of every size, a number, and an odd number of flags before what needs alignment."""
    content = TensorDict(
        flag=torch.rand(rows, 3, 1) < 0.5,
        observation=torch.randn(rows, 3, 5),
        next=TensorDict(reward=torch.randn(rows, 3, 1, dtype=torch.float64), index=torch.arange(rows)),
    )
    common = TensorDict(count=torch.tensor(7.5, dtype=torch.float64), per_step=torch.rand(3, 1, 1))
    return TensorDict(rows=content, common=common)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 4), slice(2, 2), slice(0, 5)])
def test_there_and_back(rows):
    """A share has its rows and all that is common; the other side knows no more than the layout of the batch."""
    sent = parcel(5)
    layout = Layout.of(sent)
    heard = Layout.from_json(json.loads(json.dumps(layout.as_json())))
    mine = layout.resized(rows.stop - rows.start)
    buffer = torch.full((mine.nbytes + 40,), 255, dtype=torch.uint8)  # of the length of a larger share
    mine.pack(sent, rows, buffer)
    received = heard.resized(rows.stop - rows.start).unpack(buffer)
    assert set(received.keys(True, True)) == set(sent.keys(True, True))
    for key, value in sent.items(True, True):
        assert torch.equal(received[key], value[rows] if key[0] == "rows" else value), key
        assert received[key].dtype == value.dtype
    assert (buffer[mine.nbytes :] == 255).all()


def test_no_copy():
    sent = parcel(2)
    layout = Layout.of(sent)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack(sent, slice(None), buffer)
    received = layout.unpack(buffer)
    buffer.zero_()
    assert not any(value.any() for value in received.values(True, True))


def test_aligned():
    layout = Layout.of(parcel(3))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert layout.nbytes % ALIGNMENT == 0
