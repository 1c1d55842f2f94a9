"""Runs on a full or failing disk: status ``storage``, the last checkpoint is kept, no file is partly written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from run_files import events, saved_epochs, summary_of
from training_cases import assert_equal, config, rows_of, run_with, weights_of

import pwm_torchrl.run.train as run_module
from pwm_torchrl.errors import StorageFault
from pwm_torchrl.files import Reserve, allocate, append_text, free_bytes
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.run.metrics import CsvMetrics, read_metrics
from pwm_torchrl.run.summary import RunSummary
from pwm_torchrl.run.train import Run
from pwm_torchrl.training import train

#: Four epochs, checkpoints after the second and the last.
CONFIG = config()
ERRNOS = ["ENOSPC", "EDQUOT", "EIO", "EFBIG", "EROFS"]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "write_curves", lambda run_dir: None)


def fill(disk: Path) -> None:
    allocate(disk / "ballast", free_bytes(disk))


def fill_after(epoch: int, disk: Path) -> Any:
    """A hook that fills the disk after an epoch."""

    def hook(run: Run) -> None:
        if run.loop.epoch == epoch:
            fill(disk)

    return hook


def leftovers(run_dir: Path) -> list[Path]:
    """Unfinished files."""
    return [path for path in run_dir.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


class TestFullDisk:
    def test_ends_with_its_status_and_resumes_exactly(self, small_disk, tmp_path, monkeypatch):
        """Everything that the run writes is on that disk; room for the last words was kept."""
        _, whole = run_with(monkeypatch, CONFIG, tmp_path / "whole")
        run_dir = small_disk / "run"
        with pytest.raises(StorageFault, match="No space left on device") as caught:
            run_with(monkeypatch, CONFIG, run_dir, after_epoch=fill_after(3, small_disk))
        message = str(caught.value)
        assert "\n" not in message
        assert "resume the run from its last checkpoint" in message
        assert summary_of(run_dir)["status"] == "storage"
        assert events(run_dir)[-1]["event"] == "storage"
        assert message in events(run_dir)[-1]["error"]
        assert saved_epochs(run_dir) == [2]
        assert leftovers(run_dir) == []
        (small_disk / "ballast").unlink()
        summary, parts = run_with(monkeypatch, CONFIG, run_dir, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "whole")
        assert leftovers(run_dir) == []

    def test_where_the_last_words_have_no_room_stderr_has_them(self, small_disk, monkeypatch, capsys):
        """As on a disk that others fill at the same time."""
        monkeypatch.setattr(Reserve, "free", lambda self: None)
        run_dir = small_disk / "run"
        with pytest.raises(StorageFault, match="No space left on device"):
            run_with(monkeypatch, CONFIG, run_dir, after_epoch=fill_after(3, small_disk))
        err = capsys.readouterr().err
        assert f"the run ended with status storage, which could not be written to {run_dir}: " in err
        before = summary_of(run_dir)
        assert (before["status"], before["epochs_done"]) == ("running", 2)
        assert [event["event"] for event in events(run_dir)] == ["start"]
        assert [path.name for path in leftovers(run_dir)] == [".reserve"]
        assert saved_epochs(run_dir) == [2]

    def test_from_the_beginning(self, small_disk):
        fill(small_disk)
        with pytest.raises(StorageFault, match=f"Could not write {small_disk}: No space left on device"):
            train(CONFIG, small_disk)

    def test_no_room_for_last_words(self, small_disk):
        """Then there is none for a run either."""
        allocate(small_disk / "ballast", free_bytes(small_disk) - (100 << 10))
        with pytest.raises(StorageFault, match=r"Could not reserve space for the run's summary in .*No space left"):
            train(CONFIG, small_disk)
        assert events(small_disk)[-1]["event"] == "storage"
        assert leftovers(small_disk) == []

    def test_metrics_and_events_take_a_line_or_none(self, small_disk):
        with CsvMetrics(small_disk / "metrics.csv") as metrics:
            metrics.write({"epoch": 0, "number": 1.0 / 3.0})
            write_event(small_disk, "start", text="x" * 500)
            fill(small_disk)
            for file, write in (
                ("metrics.csv", lambda number: metrics.write({"epoch": number, "number": 1.0 / 3.0})),
                ("events.jsonl", lambda number: write_event(small_disk, "micro_batch", number=number, text="x" * 500)),
            ):
                sizes, full = [], False
                while not full:  # to the end of the page that the file has already
                    sizes.append((small_disk / file).stat().st_size)
                    try:
                        write(len(sizes))
                    except OSError as error:
                        full = error.errno == errno.ENOSPC
                assert len(sizes) > 3
                assert (small_disk / file).stat().st_size == sizes[-1]
            assert events(small_disk)[-1]["number"] == len(sizes) - 1
            (small_disk / "ballast").unlink()
            metrics.write({"epoch": 999, "number": 0.0})
        epochs = read_metrics(small_disk / "metrics.csv")["epoch"]
        assert epochs == [*range(len(epochs) - 1), 999]

    def test_a_line_longer_than_the_room_is_taken_back(self, small_disk):
        with (small_disk / "file").open("ab", buffering=0) as file:
            append_text(file, "first\n")
            fill(small_disk)
            with pytest.raises(OSError, match="No space left"):
                append_text(file, "y" * 10_000)
        assert (small_disk / "file").read_text() == "first\n"


def refuse(number: int, path: Path | None = None) -> Any:
    """A function that raises a disk's error."""

    def raise_(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, errno.errorcode[number], None if path is None else str(path))

    return raise_


class TestBrokenDisk:
    @pytest.mark.parametrize("name", ERRNOS)
    @pytest.mark.parametrize("what", ["checkpoint", "metrics", "summary", "replay"])
    def test_is_told_as_storage(self, what, name, tmp_path, monkeypatch):
        """Any of the run's files cannot be written in the fourth epoch, with any error of the disk."""
        number = getattr(errno, name)

        def break_(run: Run) -> None:
            if run.loop.epoch == 3:
                raising = refuse(number, tmp_path / what)
                if what == "checkpoint":
                    monkeypatch.setattr(run.loop.record.store, "save", raising)
                elif what == "metrics":
                    monkeypatch.setattr(run.loop.record.csv, "write", raising)
                elif what == "summary":
                    once = iter([raising])
                    write = RunSummary.write
                    monkeypatch.setattr(run.summary, "write", lambda: next(once, lambda: write(run.summary))())
                else:
                    monkeypatch.setattr(run.source.samples, "extend", raising)

        with pytest.raises(StorageFault, match=name) as caught:
            run_with(monkeypatch, CONFIG, tmp_path, after_epoch=break_)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert summary_of(tmp_path)["status"] == "storage"
        assert saved_epochs(tmp_path) == [2]

    def test_where_no_file_is_named_the_run_is(self, tmp_path, monkeypatch):
        with pytest.raises(StorageFault, match=f"Could not write {tmp_path}: "):
            run_with(monkeypatch, CONFIG, tmp_path, after_epoch=refuse(errno.EIO))

    def test_an_error_that_wraps_it_is_seen_through(self, tmp_path, monkeypatch):
        def wrap(run: Run) -> None:
            try:
                refuse(errno.ENOSPC, tmp_path / "there")()
            except OSError as error:
                raise RuntimeError("could not serialize") from error

        with pytest.raises(StorageFault, match=r"Could not write .*there: ENOSPC"):
            run_with(monkeypatch, CONFIG, tmp_path, after_epoch=wrap)

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(13, "no"), OSError("odd")])
    def test_other_errors_of_the_system_stay_what_they_are(self, error, tmp_path, monkeypatch):
        def fail(run: Run) -> None:
            raise error

        with pytest.raises(OSError, match=str(error.args[-1])) as caught:
            run_with(monkeypatch, CONFIG, tmp_path, after_epoch=fail)
        assert caught.value is error
        assert summary_of(tmp_path)["status"] == "failed"
