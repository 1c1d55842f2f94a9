"""Replay on disk: errors of the disk, and ends of episodes."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from replay_cases import H, N, numbered, store_in, times

from pwm_torchrl.errors import StorageFault
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss


class TestFaults:
    def test_a_truncated_file(self, tmp_path):
        """With a memory mapping, this would be a SIGBUS."""
        store = store_in(tmp_path, steps=30)
        os.truncate(tmp_path / "segment_000006.bin", 10)
        with pytest.raises(StorageFault, match=r"segment_000006\.bin .* has 10 of its"):
            store.slices(500)

    @pytest.mark.parametrize("call", ["preadv", "posix_fadvise"])
    def test_a_read_that_fails(self, call, tmp_path, monkeypatch):
        store = store_in(tmp_path, steps=10)
        store.slices(1000)  # opens the files

        def fail(*args):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(StorageFault, match=r"read the replay file .*segment_.*Input/output error"):
            store.slices(3)

    @pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "open", "fsync"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_failed_write_leaves_the_store_as_before(self, call, number, tmp_path, monkeypatch):
        store = store_in(tmp_path, steps=12)
        expected = store.get(torch.tensor([2, 8]), torch.tensor([0, 1]), H)
        with monkeypatch.context() as patch:

            def fail(*args):
                raise OSError(number, os.strerror(number))

            patch.setattr(os, call, fail)
            with pytest.raises(StorageFault, match=os.strerror(number)) as caught:
                store.extend(numbered(12, 5))
        assert "\n" not in str(caught.value)
        assert (store.steps, store.filled) == (12, 10)
        assert (store.get(torch.tensor([2, 8]), torch.tensor([0, 1]), H) == expected).all()
        assert times(store) == set(range(2, 12))
        # The disk is repaired.
        store.extend(numbered(12, 5))
        assert times(store) == set(range(7, 17))
        assert store.get(torch.tensor([12]), torch.tensor([0]), 5)["observation"][0, :, 0].tolist() == [
            12,
            13,
            14,
            15,
            16,
        ]

    def test_sampling_nothing(self, tmp_path):
        with pytest.raises(RuntimeError, match="replay is empty"):
            store_in(tmp_path).get(torch.tensor([0]), torch.tensor([0]), 1)


class TestEpisodes:
    @pytest.mark.parametrize("segment", [1, 3, 7])
    def test_what_lies_behind_an_end_is_masked(self, segment, tmp_path):
        """Also at the boundaries of files and of the ring; all starts can be drawn."""
        store = store_in(tmp_path, capacity=20, segment=segment)
        for first in range(0, 35, 5):
            store.extend(numbered(first, 5, done_every=6))
        loss = PWMModelLoss(make_world_model(WorldModelSpec(2, 1, 16, [8], [8])))
        batch = store.slices(600)
        start = batch["observation"][:, 0, 0]
        assert set(start.int().tolist()) == set(range(15, 35 - H + 1))
        last = start + (5 - start) % 6  # of the episode
        time = start.unsqueeze(1) + torch.arange(H)
        assert torch.equal(batch["observation"][..., 0], time)
        valid = loss.read(batch).valid.squeeze(-1).T
        assert torch.equal(valid, time <= last.unsqueeze(1))
        assert not valid.all()

    @pytest.mark.parametrize("segment", [1, 4, 7])
    @pytest.mark.parametrize("steps", [8, 12, 13])
    def test_episodes_that_are_not_continued(self, steps, segment, tmp_path):
        """Also after resuming, before anything is written."""
        state = store_in(tmp_path, segment=segment, steps=steps).state_dict()
        store = store_in(tmp_path, segment=segment)
        store.load_state_dict(state)
        store.end_episodes()
        for first in range(steps, steps + 6, 2):
            store.extend(numbered(first, 2))
        slices = store.slices(500)
        ended = slices["observation"][slices["next", "done"].squeeze(-1)]
        assert {(int(t), int(n)) for t, n in ended.tolist()} == {(steps - 1, n) for n in range(N)}
        valid = PWMModelLoss(make_world_model(WorldModelSpec(2, 1, 16, [8], [8]))).read(slices).valid.squeeze(-1).T
        time = slices["observation"][..., 0]
        assert torch.equal(valid, (time < steps) | (time[:, :1] >= steps))
