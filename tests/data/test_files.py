"""Checks of disk space, allocation, and the errors of a disk that refuses a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from replay_cases import H, N, random_steps

from pwm_torchrl import files as module
from pwm_torchrl.data import SegmentStore, TrajectoryReplay
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import (
    allocate,
    amount,
    filesystem_type,
    free_bytes,
    is_storage_error,
    refuse_memory,
    replacing,
    storage_faults,
    write_durably,
    write_zeros,
)
from pwm_torchrl.memory.storage import replay_disk_bytes

SHM = Path("/dev/shm")


class TestMemoryFilesystems:
    @pytest.mark.skipif(filesystem_type(SHM) != "tmpfs", reason="/dev/shm is not a tmpfs here")
    def test_dev_shm_is_refused(self, monkeypatch):
        monkeypatch.setattr("pwm_torchrl.data.replay.refuse_memory", refuse_memory)  # whatever TMPDIR is
        with pytest.raises(ConfigurationError, match=r"/dev/shm/run/replay: it is on a tmpfs .*RAM.*=memory") as caught:
            TrajectoryReplay(10 * N, N, H, "disk", SHM / "run" / "replay")
        assert "\n" not in str(caught.value)
        assert not (SHM / "run").exists()

    @pytest.mark.skipif(filesystem_type(SHM) != "tmpfs", reason="/dev/shm is not a tmpfs here")
    def test_so_is_a_link_there(self, tmp_path):
        (tmp_path / "replay").symlink_to(SHM)
        with pytest.raises(ConfigurationError, match="RAM"):
            refuse_memory(tmp_path / "replay" / "deeper")

    def test_only_disk_is_checked(self):
        TrajectoryReplay(10 * N, N, H, "memory", SHM)

    def test_any_mount_of_that_kind(self, small_disk):
        with pytest.raises(ConfigurationError, match="tmpfs"):
            refuse_memory(small_disk / "replay")

    @pytest.mark.parametrize(
        ("kind", "refused"), [("tmpfs", True), ("ramfs", True), ("devtmpfs", True), ("ext4", False)]
    )
    def test_kinds(self, kind, refused, tmp_path, monkeypatch):
        device = tmp_path.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        table = tmp_path / "mountinfo"
        table.write_text(
            f"22 1 999:999 / / rw - xfs /dev/x rw\n23 22 {number} / /a\\040b rw shared:1 - {kind} none rw\n"
        )
        assert filesystem_type(tmp_path / "not" / "there", table) == kind
        monkeypatch.setattr(module, "filesystem_type", lambda path: kind)
        if refused:
            with pytest.raises(ConfigurationError, match=kind):
                refuse_memory(tmp_path)
        else:
            refuse_memory(tmp_path)

    def test_where_it_cannot_be_told(self, tmp_path):
        assert filesystem_type(tmp_path, tmp_path / "no mountinfo") is None
        (tmp_path / "mountinfo").write_text("22 1 999:999 / / rw - xfs /dev/x rw\n")
        assert filesystem_type(tmp_path, tmp_path / "mountinfo") is None


class TestAllocation:
    def test_owns_its_blocks(self, tmp_path):
        allocate(tmp_path / "file", 1 << 20)
        stat = (tmp_path / "file").stat()
        assert (stat.st_size, stat.st_blocks * 512 >= 1 << 20) == (1 << 20, True)

    def test_replaces_what_lies_there(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 100)
        allocate(tmp_path / "file", 10)
        assert (tmp_path / "file").read_bytes() == bytes(10)

    def test_of_nothing(self, tmp_path):
        allocate(tmp_path / "file", 0)
        assert (tmp_path / "file").stat().st_size == 0

    @pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None])
    def test_without_support_of_the_file_system(self, reason, tmp_path, monkeypatch):
        """Zeros are written instead; None: the system has no such call."""

        def refuse(*args):
            raise OSError(reason, "not here")

        if reason is None:
            monkeypatch.delattr(os, "posix_fallocate")
        else:
            monkeypatch.setattr(os, "posix_fallocate", refuse)
        size = (2 << 20) + 77
        allocate(tmp_path / "file", size)
        stat = (tmp_path / "file").stat()
        assert (stat.st_size, stat.st_blocks * 512 >= size) == (size, True)
        assert not any((tmp_path / "file").read_bytes())

    @pytest.mark.parametrize("fallback", [False, True])
    def test_too_much_leaves_nothing(self, fallback, small_disk, monkeypatch):
        if fallback:
            monkeypatch.setattr(module, "_take_blocks", write_zeros)
        with pytest.raises(OSError, match="No space left") as caught:
            allocate(small_disk / "file", 40 << 20)
        assert caught.value.errno == errno.ENOSPC
        assert not (small_disk / "file").exists()
        assert free_bytes(small_disk) == 32 << 20

    def test_a_text_is_replaced_whole_or_not_at_all(self, small_disk):
        path = small_disk / "text"
        write_durably(path, "before")
        allocate(small_disk / "ballast", free_bytes(small_disk))
        with pytest.raises(OSError, match="No space left"):
            write_durably(path, "after" * 10_000)
        assert path.read_text() == "before"
        assert sorted(os.listdir(small_disk)) == ["ballast", "text"]


class TestReplacing:
    @pytest.mark.parametrize("durable", [False, True])
    def test_readers_see_the_old_file_until_the_end(self, durable, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("before")
        with replacing(path, durable=durable) as draft:
            draft.write_text("after")
            assert (draft.parent, path.read_text()) == (tmp_path, "before")
        assert path.read_text() == "after"
        assert os.listdir(tmp_path) == ["file.txt"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_leaves_the_old_file_alone(self, error, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("before")

        def fail():
            with replacing(path) as draft:
                draft.write_text("half")
                raise error

        with pytest.raises(error):
            fail()
        assert path.read_text() == "before"
        assert os.listdir(tmp_path) == ["file.txt"]

    def test_two_writers_of_one_file_do_not_mix(self, tmp_path):
        path = tmp_path / "file.txt"
        with replacing(path) as first:
            first.write_text("first")
            with replacing(path) as second:
                second.write_text("second")
            assert path.read_text() == "second"
        assert path.read_text() == "first"
        assert os.listdir(tmp_path) == ["file.txt"]

    def test_the_suffix_is_kept_for_the_writer(self, tmp_path):
        with replacing(tmp_path / "video.mp4", suffix=".mp4") as draft:
            assert draft.suffix == ".mp4"
            draft.touch()

    def test_permissions_are_those_of_any_file(self, tmp_path):
        (tmp_path / "plain").touch()
        write_durably(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_a_missing_folder_is_reported_with_the_name_of_the_file(self, tmp_path):
        path = tmp_path / "gone" / "file.txt"
        with pytest.raises(FileNotFoundError) as caught:
            write_durably(path, "text")
        assert caught.value.filename == str(path)
        assert not path.parent.exists()

    def test_a_file_in_the_place_of_the_folder_is_reported_likewise(self, tmp_path):
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "out.json"
        with pytest.raises(NotADirectoryError) as caught:
            write_durably(path, "text")
        assert caught.value.filename == str(path)

    def test_a_name_may_be_as_long_as_the_file_system_allows(self, tmp_path):
        path = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
        write_durably(path, "text")
        assert path.read_text() == "text"

    def test_a_folder_of_many_files_is_not_listed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Path, "glob", None)
        with replacing(tmp_path / "file", sweep=False) as draft:
            draft.touch()
        assert os.listdir(tmp_path) == ["file"]

    def test_what_a_killed_process_left_is_deleted_after_a_day(self, tmp_path):
        old, new, other = (tmp_path / f".{name}.new" for name in ("file.0", "file.1", "other.0"))
        for each in (old, new, other):
            each.touch()
        for each in (old, other):
            os.utime(each, (0, 0))
        write_durably(tmp_path / "file", "text")
        assert sorted(os.listdir(tmp_path)) == [".file.1.new", ".other.0.new", "file"]


class TestSentences:
    @pytest.mark.parametrize(
        ("number", "advice"),
        [
            (errno.ENOSPC, "free space or raise the quota"),
            (errno.EDQUOT, "free space or raise the quota"),
            (errno.EIO, "check the disk or the file server"),
            (errno.ESTALE, "check the disk or the file server"),
        ],
    )
    def test_name_file_need_and_remedy(self, number, advice, tmp_path):
        path = tmp_path / "segment"
        with pytest.raises(StorageFault, match=advice) as caught, storage_faults(path, "write", 3 << 20):
            raise OSError(number, os.strerror(number))
        message = str(caught.value)
        assert f"{path}: {os.strerror(number)}" in message
        assert "3.0 MiB were needed" in message
        assert "are free" in message
        assert "resume" in message
        assert "\n" not in message

    def test_where_free_space_cannot_be_read(self, tmp_path, monkeypatch):
        def fail(path):
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(module, "free_bytes", fail)
        with pytest.raises(StorageFault, match="the free space is unknown"), storage_faults(tmp_path, "write"):
            raise OSError(errno.EIO, "broken")

    def test_other_errors_pass(self, tmp_path):
        with pytest.raises(KeyError), storage_faults(tmp_path, "write"):
            raise KeyError("no business of the disk")

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (OSError(errno.ENOSPC, "full"), True),
            (OSError(errno.EDQUOT, "quota"), True),
            (OSError(errno.EIO, "broken"), True),
            (OSError(errno.EROFS, "read-only"), True),
            (StorageFault("a segment is missing"), True),
            (FileNotFoundError(errno.ENOENT, "a typo"), False),
            (ConnectionResetError(errno.ECONNRESET, "the logger's"), False),
            (OSError("without a number"), False),
            (RuntimeError("other"), False),
        ],
    )
    def test_which_errors_are_the_disks(self, error, expected):
        assert is_storage_error(error) is expected

    @pytest.mark.parametrize(("count", "text"), [(12, "12 bytes"), (5 << 20, "5.0 MiB"), (3 << 30, "3,072.0 MiB")])
    def test_amounts(self, count, text):
        assert amount(count) == text


@pytest.mark.usefixtures("any_filesystem")
class TestSpace:
    """64 MiB on a disk of 32 MiB."""

    capacity = (64 << 20) // 26 // N * N  # records of 26 bytes

    def test_is_asked_for_before_anything_runs(self, small_disk):
        with pytest.raises(StorageFault, match=r"needs 6\d\.\d MiB .*training\.replay_capacity=\d+.* 32\.0 MiB"):
            TrajectoryReplay(self.capacity, N, H, "disk", small_disk / "replay", observation_dim=2, action_dim=1)
        assert not (small_disk / "replay").exists()

    def test_is_asked_for_with_the_first_batch(self, small_disk):
        replay = TrajectoryReplay(self.capacity, N, H, "disk", small_disk / "replay")
        with pytest.raises(StorageFault, match=r"needs 6\d\.\d MiB") as caught:
            replay.extend(random_steps(4, N))
        assert "\n" not in str(caught.value)
        assert (len(replay), replay.can_sample) == (0, False)
        assert not (small_disk / "replay").exists()

    def test_for_what_lies_between_checkpoints_too(self, small_disk):
        dims = {"observation_dim": 2, "action_dim": 1}
        small = self.capacity // 4
        TrajectoryReplay(small, N, H, "disk", small_disk, **dims)
        with pytest.raises(StorageFault, match="between checkpoints"):
            TrajectoryReplay(small, N, H, "disk", small_disk, since_checkpoint_steps=self.capacity // N, **dims)

    def test_what_is_there_counts(self, small_disk):
        """A resumed run needs no additional space."""
        capacity = (20 << 20) // 26 // N * N
        dims = {"observation_dim": 2, "action_dim": 1}
        replay = TrajectoryReplay(capacity, N, H, "disk", small_disk / "replay", **dims)
        for _ in range(20):
            replay.extend(random_steps(capacity // N // 20, N))
        assert replay_disk_bytes(2, 1, capacity, N, 1) > free_bytes(small_disk)
        TrajectoryReplay(capacity, N, H, "disk", small_disk / "replay", **dims)

    def test_a_store_by_itself_asks_too(self, small_disk):
        store = SegmentStore(small_disk, self.capacity // N, N, H)
        with pytest.raises(StorageFault, match=r"needs .*MiB"):
            store.extend(random_steps(4, N))
