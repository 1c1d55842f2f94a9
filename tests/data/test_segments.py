"""Replay on disk: contents of its files, deletion of old files, and checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from replay_cases import H, N, numbered, random_steps, store_in, times

from pwm_torchrl.data import SegmentStore
from pwm_torchrl.data.layout import STORED_KEYS, RecordLayout, key_name
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.modules import WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss


def segments(folder) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("segment_*.bin"))


class TestFiles:
    def test_records_lie_as_described(self, tmp_path):
        """Read the records with NumPy and the description."""
        batch = random_steps(9, N, observation_dim=3, action_dim=2)
        SegmentStore(tmp_path, 10, N, H, 4).extend(batch)
        described = json.loads((tmp_path / "replay.json").read_text())
        assert described["segment"] == "[env, step, record]"
        entries = described["record"]
        record = np.dtype([(name, entry["dtype"], entry["shape"]) for name, entry in entries.items()])
        assert record.itemsize == described["record_bytes"]
        shape = (described["num_envs"], described["segment_steps"])
        files = [np.fromfile(path, record).reshape(shape) for path in sorted(tmp_path.glob("segment_*.bin"))]
        stored = np.concatenate(files, axis=1)[:, :9]
        for key in STORED_KEYS:
            assert np.array_equal(stored[key_name(key)], batch.get(key).numpy())

    def test_data_of_a_checkpoint_are_never_overwritten(self, tmp_path):
        store = store_in(tmp_path, steps=10)
        store.release(store.state_dict()["steps"])
        before = {n: store._files.path(n).read_bytes() for n in segments(tmp_path)}
        for first in range(10, 60, 5):
            store.extend(numbered(first, 5))
        assert before.keys() == {0, 1, 2}
        for number in (0, 1):
            assert store._files.path(number).read_bytes() == before[number]
        # Of the third file, steps 8 and 9.
        third = (before[2], store._files.path(2).read_bytes())
        then, now = (np.frombuffer(content, np.uint8).reshape(N, 4, -1)[:, :2] for content in third)
        assert np.array_equal(then, now)

    def test_a_slice_is_one_read_or_two(self, tmp_path, monkeypatch):
        store = store_in(tmp_path, capacity=20, segment=8, steps=20)
        read, reads = os.preadv, []
        monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or read(*args))
        store.get(torch.tensor([0, 4, 8, 16]), torch.tensor([0, 1, 2, 0]), H)
        assert len(reads) == 4
        store.get(torch.tensor([5, 7]), torch.tensor([0, 1]), H)
        assert len(reads) == 8

    def test_files_out_of_sight_are_closed(self, tmp_path):
        store = store_in(tmp_path, steps=60)
        store.release(0)
        store.extend(numbered(60, 4))
        assert segments(tmp_path)[-3:] == [13, 14, 15]
        assert len(store._files._open) <= 10 // 4 + 2

    def test_all_are_closed_with_the_store(self, tmp_path):
        store = store_in(tmp_path, steps=20)
        store.slices(10)
        descriptors = list(store._files._open.values())
        assert descriptors
        del store
        for descriptor in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


class TestDeletion:
    """Segments of 4 steps; the newest 10 steps can be sampled."""

    def test_without_a_checkpoint_the_capacity(self, tmp_path):
        store = store_in(tmp_path, steps=60)
        assert segments(tmp_path)[0] == 11  # steps 47 to 56 while the last batch was written, 50 to 59 now
        assert times(store) == set(range(50, 60))

    def test_with_one_the_capacity_and_what_was_written_since(self, tmp_path):
        store = store_in(tmp_path, steps=30)
        store.release(store.state_dict()["steps"])
        assert segments(tmp_path) == [5, 6, 7]
        for first in range(30, 60, 3):
            store.extend(numbered(first, 3))
        assert segments(tmp_path) == list(range(5, 15))
        store.release(store.state_dict()["steps"])
        assert segments(tmp_path) == [12, 13, 14]
        store.release(45)  # as after falling back
        assert times(store) == set(range(50, 60))

    def test_nothing_goes_between_loading_and_the_first_release(self, tmp_path):
        """A run that falls back to a checkpoint does not yet know which others are kept."""
        store = store_in(tmp_path, steps=30)
        store.release(12)
        state = store.state_dict()
        again = store_in(tmp_path)
        again.load_state_dict(state)
        kept = segments(tmp_path)
        for first in range(30, 60, 3):
            again.extend(numbered(first, 3))
        assert set(kept) <= set(segments(tmp_path))
        again.release(30)
        assert segments(tmp_path)[0] == 5

    def test_a_new_run_in_an_old_folder_starts_empty(self, tmp_path):
        state = store_in(tmp_path, steps=30).state_dict()
        store = store_in(tmp_path, segment=5, steps=6)
        assert segments(tmp_path) == [0, 1]
        assert times(store) == set(range(6))
        with pytest.raises(StorageFault, match=r"steps 20 to 30 .*another run"):
            store_in(tmp_path).load_state_dict(state)

    def test_a_failed_deletion_is_said_once_and_tried_again(self, tmp_path, capsys):
        store = store_in(tmp_path, steps=20)
        stubborn = tmp_path / "segment_000001.bin"
        stubborn.unlink(missing_ok=True)
        stubborn.mkdir()
        for first in (20, 23):
            store.extend(numbered(first, 3))
            store.release(first)
        assert capsys.readouterr().err.count(str(stubborn)) == 1
        assert 1 in segments(tmp_path)
        assert 2 not in segments(tmp_path)
        assert times(store) == set(range(16, 26))
        stubborn.rmdir()
        stubborn.touch()
        store.release(26)
        assert 1 not in segments(tmp_path)


class TestCheckpoints:
    def test_hold_no_data(self, tmp_path):
        state = store_in(tmp_path, steps=30).state_dict()
        assert (state["steps"], state["envs"], state["filled"]) == (30, N, 10)
        assert state["done"].nbytes == N
        assert state["checksums"].shape == (3, 3)  # of the segments of its steps
        assert {name for name, value in state.items() if isinstance(value, torch.Tensor)} == {"done", "checksums"}

    def test_data_reach_the_disk_first(self, tmp_path, monkeypatch):
        """Every written file and its folder."""
        store = store_in(tmp_path, capacity=40, segment=4)
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
        for first in range(0, 22, 2):
            store.extend(numbered(first, 2))
            if first == 10:
                synced.clear()
        store.state_dict()
        assert set(synced) == {str(tmp_path), *(str(store._files.path(number)) for number in (3, 4, 5))}
        synced.clear()
        store.state_dict()
        assert not synced

    def test_a_sync_that_fails_fails_the_checkpoint(self, tmp_path, monkeypatch):
        store = store_in(tmp_path, steps=2)

        def fail(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StorageFault, match=r"segment_000000\.bin: Input/output error"):
                store.state_dict()
            with pytest.raises(StorageFault, match=r"segment_000000\.bin: Input/output error"):
                store.extend(numbered(2, 2))  # the segment's last steps
        store.extend(numbered(2, 2))
        store_in(tmp_path).load_state_dict(store.state_dict())

    @pytest.mark.parametrize("number", [5, 6, 7])
    @pytest.mark.parametrize("damage", ["missing", "short"])
    def test_every_file_is_needed(self, damage, number, tmp_path):
        state = store_in(tmp_path, steps=30).state_dict()
        file = tmp_path / f"segment_{number:06d}.bin"
        if damage == "missing":
            file.unlink()
        else:
            os.truncate(file, 100)
        store = store_in(tmp_path)
        match = rf"{file.name} .*{'is missing' if damage == 'missing' else 'has 100 of its'}.* without resume"
        with pytest.raises(StorageFault, match=match) as caught:
            store.load_state_dict(state)
        assert "\n" not in str(caught.value)
        assert store.steps == 0

    @pytest.mark.parametrize("steps", [30, 32])
    @pytest.mark.parametrize("ended", [False, True])
    def test_a_flipped_bit_is_seen(self, ended, steps, tmp_path):
        """In every segment that a checkpoint needs, and in every record of it."""
        store = store_in(tmp_path, steps=steps)
        if ended:
            store.end_episodes()
        state = store.state_dict()
        journal = store._journal
        for step in range(steps - 10, steps):
            number, row = divmod(step, 4)
            file = tmp_path / f"segment_{number:06d}.bin"
            whole = file.read_bytes()
            for env in range(N):
                flipped = bytearray(whole)
                flipped[(env * 4 + row) * journal.layout.record_bytes] ^= 1
                file.write_bytes(flipped)
                again = store_in(tmp_path)
                with pytest.raises(StorageFault, match=rf"{file.name} .*is damaged: its checksum.* without resume"):
                    again.load_state_dict(state)
                assert again.steps == 0
            file.write_bytes(whole)
        store_in(tmp_path).load_state_dict(state)

    def test_checksums_follow_a_run_that_goes_on(self, tmp_path):
        """Through resumptions, back to an earlier checkpoint too, and episodes that end with them."""
        store, states = store_in(tmp_path, steps=7), []
        for count in (2, 3, 5, 1):
            states.append(store.state_dict())
            store.release(states[0]["steps"])
            store = store_in(tmp_path)
            store.load_state_dict(states[-1])
            store.end_episodes()
            store.extend(numbered(store.steps, count))
        store_in(tmp_path).load_state_dict(store.state_dict())
        store_in(tmp_path).load_state_dict(states[0])

    def test_a_reader_leaves_the_files_of_a_run_that_goes_on(self, tmp_path):
        store = store_in(tmp_path, steps=10)
        early = store.state_dict()
        store.release(10)
        store.end_episodes()
        store.extend(numbered(10, 3))
        late = store.state_dict()
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        reader = store_in(tmp_path)
        reader.load_state_dict(early, read_only=True)
        assert reader._newest_done().all()
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        store_in(tmp_path).load_state_dict(late)

    def test_those_of_an_earlier_version_have_no_checksums(self, tmp_path):
        state = store_in(tmp_path, steps=30).state_dict()
        del state["checksums"]
        store = store_in(tmp_path)
        store.load_state_dict(state)
        store.extend(numbered(30, 3))
        state = store.state_dict()
        assert sorted(state["checksums"][:, 0].tolist()) == [7, 8]  # 5 and 6 were written before
        store_in(tmp_path).load_state_dict(state)
        file = tmp_path / "segment_000007.bin"
        file.write_bytes(bytes(len(file.read_bytes())))
        with pytest.raises(StorageFault, match=file.name):
            store_in(tmp_path).load_state_dict(state)

    def test_the_folder_is_gone(self, tmp_path):
        state = store_in(tmp_path / "replay", steps=30).state_dict()
        shutil.rmtree(tmp_path / "replay")
        with pytest.raises(StorageFault, match=r"needs steps 20 to 30 of the replay in .*do not exist"):
            store_in(tmp_path / "replay").load_state_dict(state)

    @pytest.mark.parametrize("damage", ["text", "bytes", "key", "version"])
    def test_the_description_is_damaged(self, damage, tmp_path):
        state = store_in(tmp_path, steps=30).state_dict()
        file = tmp_path / "replay.json"
        content = json.loads(file.read_text())
        if damage == "text":
            file.write_text(file.read_text()[:50])
        elif damage == "bytes":
            file.write_bytes(b"\xa2" + file.read_bytes())
        elif damage == "key":
            del content["record"]["action"]
            file.write_text(json.dumps(content))
        else:
            file.write_text(json.dumps({**content, "schema_version": 99}))
        with pytest.raises(StorageFault, match="version 99 .*version 1" if damage == "version" else "is damaged"):
            store_in(tmp_path).load_state_dict(state)

    def test_going_back_invalidates_what_came_later(self, tmp_path):
        """The later data are overwritten by another writer, which may collect different data."""
        store = store_in(tmp_path, steps=12)
        early = store.state_dict()
        store.release(12)
        store.extend(numbered(12, 6))
        late = store.state_dict()
        for state in (early, late, early):  # loading alone changes nothing
            again = store_in(tmp_path)
            again.load_state_dict(state)
        again.extend(numbered(12, 2))
        latest = again.state_dict()
        with pytest.raises(StorageFault, match=r"needs steps 8 to 18 .*from step 12 on"):
            store_in(tmp_path).load_state_dict(late)
        for state in (early, latest):
            again = store_in(tmp_path)
            again.load_state_dict(state)
            assert times(again) == set(range(state["steps"] - 10, state["steps"]))

    def test_of_an_empty_replay(self, tmp_path):
        state = store_in(tmp_path).state_dict()
        store = store_in(tmp_path, steps=5)
        store.load_state_dict(state)
        assert store.steps == 0
        store.extend(numbered(0, 6))
        assert times(store) == set(range(6))

    @pytest.mark.parametrize("resumed", [False, True])
    def test_other_entries_are_refused(self, resumed, tmp_path):
        store = store_in(tmp_path, steps=6)
        if resumed:
            state = store.state_dict()
            store = store_in(tmp_path)
            store.load_state_dict(state)
        described = (tmp_path / "replay.json").read_text()
        with pytest.raises(ConfigurationError, match=r"observation.*\[2\].*this batch has .*\[3\]"):
            store.extend(random_steps(2, N, observation_dim=3))
        assert store.steps == 6
        assert (tmp_path / "replay.json").read_text() == described


def test_layouts():
    batch = random_steps(2, N)
    layout = RecordLayout.of(batch)
    assert layout.record_bytes == 4 * (2 + 1 + 2 + 1) + 2
    assert RecordLayout.described(json.loads(json.dumps(layout.describe()))) == layout
    batch["observation"] = batch["observation"].double()
    assert RecordLayout.of(batch) != layout


# Errors of the disk, and ends of episodes -----------------------------------------------------------------------------


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
