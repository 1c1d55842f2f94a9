"""How a run ends: everything is closed, and the first error is the one that is told."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext

import pytest
from run_files import events, summary_of
from training_cases import config

from pwm_torchrl.errors import ConfigurationError, OutOfMemory, StorageFault, Superseded
from pwm_torchrl.run.claims import claimed, read_outcome
from pwm_torchrl.run.summary import Closing, RunSummary, named, record_end


def failing(text: str):
    def close() -> None:
        raise RuntimeError(text)

    return close


class TestClosing:
    @pytest.mark.parametrize(
        "error", [None, KeyError("a bug"), KeyboardInterrupt()], ids=["done", "error", "interrupt"]
    )
    def test_everything_in_reverse_order_however_it_ended(self, error):
        closed = []
        with nullcontext() if error is None else pytest.raises(type(error)), Closing() as closing:
            for name in ("first", "second", "third"):
                closing.later(name, lambda name=name: closed.append(name))
            if error is not None:
                raise error
        assert closed == ["third", "second", "first"]

    def test_what_fails_is_a_warning_and_the_rest_is_closed(self, capsys):
        closed = []
        with Closing() as closing:
            closing.later("the environment", lambda: closed.append("environment"))
            closing.later("the logger", failing("no answer\nfrom the server"))
            closing.later("the progress bar", lambda: closed.append("bar"))
            closing.later("metrics.csv", failing(""))
        assert closed == ["bar", "environment"]
        assert capsys.readouterr().err.splitlines() == [
            "closing metrics.csv failed: RuntimeError",
            "closing the logger failed: no answer from the server",
        ]

    def test_it_does_not_hide_the_first_error(self, capsys):
        closing = Closing()
        closing.later("the environment", failing("a worker is gone"))
        with pytest.raises(KeyError, match="a bug"), closing:
            raise KeyError("a bug")
        assert "closing the environment failed: a worker is gone" in capsys.readouterr().err

    def test_nothing_is_closed_twice(self):
        closed = []
        with Closing() as closing:
            closing.later("it", lambda: closed.append(1))
        closing.__exit__()
        assert closed == [1]


class TestNamed:
    @pytest.mark.parametrize(
        "error", [ConfigurationError("bad"), Superseded("gone"), KeyError("a bug"), OSError("odd")]
    )
    def test_our_own_and_bugs_stay_what_they_are(self, error, tmp_path):
        assert named(error, tmp_path) is error

    def test_a_disk(self, tmp_path):
        fault = named(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")), tmp_path)
        assert isinstance(fault, StorageFault)
        assert str(tmp_path / "x") in str(fault)

    def test_memory(self, tmp_path):
        fault = named(RuntimeError("CUDA out of\nmemory: out of memory"), tmp_path)
        assert isinstance(fault, OutOfMemory)
        for key in ("env.num_envs", "training.replay_storage=disk"):
            assert key in str(fault)
        assert "\n" not in str(fault)

    def test_a_cause(self, tmp_path):
        error = RuntimeError("could not serialize")
        error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
        assert isinstance(named(error, tmp_path), StorageFault)
        assert str(tmp_path) in str(named(error, tmp_path))


def test_the_end_is_written_even_before_there_is_a_summary(tmp_path):
    with claimed(tmp_path, []) as claim:
        record_end(tmp_path, claim, None, ConfigurationError("env.id=x is no environment"))
    assert read_outcome(tmp_path, 1)["status"] == "failed"
    (event,) = events(tmp_path)
    assert (event["event"], event["epoch"]) == ("failed", 0)
    assert "env.id=x" in event["error"]
    assert not (tmp_path / "summary.json").exists()


class TestRefusedAttempt:
    """One that cannot go on with what an earlier one trained leaves that as it was."""

    def summary(self, run_dir, resume):
        return RunSummary.start(config(), run_dir, resume)

    @pytest.mark.parametrize(
        ("before", "after"),
        [("stopped", "stopped"), ("memory", "memory"), ("running", "stopped"), ("finished", "finished")],
    )
    def test_the_status_is_that_of_before(self, before, after, tmp_path):
        (tmp_path / "summary.json").write_text(json.dumps({"status": before, "epochs_done": 3}))
        with claimed(tmp_path) as claim:
            record_end(tmp_path, claim, self.summary(tmp_path, True), ConfigurationError("no such module"))
        assert (summary_of(tmp_path)["status"], summary_of(tmp_path)["epochs_done"]) == (after, 3)
        (event,) = events(tmp_path, "refused")
        assert event["error"] == "ConfigurationError: no such module"
        assert read_outcome(tmp_path, 1)["status"] == "failed"  # for the batch script, which must not try it again

    def test_a_first_attempt_has_failed(self, tmp_path):
        with claimed(tmp_path) as claim:
            record_end(tmp_path, claim, self.summary(tmp_path, False), ConfigurationError("no such module"))
        assert summary_of(tmp_path)["status"] == "failed"

    @pytest.mark.parametrize(
        "content", ["", "{", "[1]", '{"restarts": "many", "wall_clock_s": null, "peak_return": "x"}']
    )
    def test_a_damaged_summary_blocks_nothing(self, content, tmp_path):
        (tmp_path / "summary.json").write_text(content)
        summary = self.summary(tmp_path, True)
        assert (summary.restarts, summary.epochs_done, summary.peak_return) == (1, 0, None)
        assert summary_of(tmp_path)["status"] == "running"
