"""The profile of a run's updates: when it begins, what the trace holds, and that a run without one is not touched."""

from __future__ import annotations

import errno
import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.run import debugging
from pwm_torchrl.run.debugging import TRACE, WARM_UP, UpdateProfile

#: Updates of one epoch of the tests' configuration, in their order.
EPOCH = ["model"] * 2 + ["actor"] + ["critic"] * 4


def updates_in(run_dir: Path) -> Counter[str]:
    """How often a trace holds the range of an update, by the network's name."""
    with gzip.open(run_dir / TRACE, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    return Counter({name.removesuffix(" update"): n for name, n in names.items() if name.endswith(" update")})


def profiled(count: int, **changes: object) -> object:
    return config({"training.profile": count, **{key.replace("__", "."): value for key, value in changes.items()}})


class TestRun:
    def test_the_trace_holds_as_many_updates_as_were_asked_for(self, tmp_path, monkeypatch, capfd):
        """Two epochs warm up, since each has a single actor update; one more update is the profiler's own warm-up."""
        run_with(monkeypatch, profiled(len(EPOCH)), tmp_path)
        assert updates_in(tmp_path) == Counter(EPOCH)
        printed = capfd.readouterr()
        (line,) = [line for line in printed.out.splitlines() if TRACE in line]
        assert "profiler_start" not in printed.out + printed.err, "the library's own lines"
        assert f"profile of {len(EPOCH)} updates" in line
        assert str(tmp_path / TRACE) in line
        assert TRACE in (tmp_path / "README.md").read_text(encoding="utf-8")

    def test_it_changes_nothing_that_is_learned(self, tmp_path, monkeypatch):
        _, plain = run_with(monkeypatch, config(), tmp_path / "plain")
        _, traced = run_with(monkeypatch, profiled(3), tmp_path / "traced")
        assert not (tmp_path / "plain" / TRACE).exists()
        assert plain.algorithm.updates.around is None
        assert traced.algorithm.updates.around is None, "it has taken itself away"
        assert_equal(weights_of(traced), weights_of(plain))
        assert rows_of(tmp_path / "traced") == rows_of(tmp_path / "plain")

    def test_a_run_that_ends_early_writes_what_it_has(self, tmp_path, monkeypatch, capsys):
        run_with(monkeypatch, profiled(1000), tmp_path)
        found = updates_in(tmp_path)
        assert 0 < found.total() < 1000
        assert f"profile of {found.total()} of 1000 updates" in capsys.readouterr().out

    def test_a_run_that_is_over_before_says_that_there_is_none(self, tmp_path, monkeypatch, capsys):
        run_with(monkeypatch, profiled(5, training__epochs=1), tmp_path)
        assert not (tmp_path / TRACE).exists()
        assert f"no {TRACE}" in capsys.readouterr().out

    def test_a_resumed_run_may_be_profiled(self, tmp_path, monkeypatch):
        run_with(monkeypatch, config({"training.epochs": 6}), tmp_path, after_epoch=stop_after(2))
        run_with(monkeypatch, profiled(2, training__epochs=6), tmp_path, resume=True)
        assert updates_in(tmp_path).total() == 2


class FakeUpdates:
    """Two networks that are trained, and the attribute that the profile sets."""

    def __init__(self) -> None:
        self.executor = SimpleNamespace(undo={"model": None, "actor": None})
        self.around = None

    def make(self, *names: str) -> None:
        for name in names:
            if self.around is None:
                continue
            with self.around(name):
                torch.ones(2).add_(1)


class TestBegin:
    def profile(self, tmp_path: Path, started: bool = True) -> tuple[FakeUpdates, UpdateProfile]:
        updates = FakeUpdates()
        return updates, UpdateProfile(updates, 1, tmp_path, lambda: started, torch.device("cpu"))

    def test_not_before_every_network_is_warm(self, tmp_path):
        updates, _ = self.profile(tmp_path)
        updates.make(*["model"] * 9, *["actor"] * WARM_UP)
        assert not (tmp_path / TRACE).exists()
        updates.make("model", "actor")  # the first warms the profiler up
        assert updates_in(tmp_path) == {"actor": 1}
        assert updates.around is None

    def test_not_in_the_first_epoch_with_updates(self, tmp_path, capsys):
        updates, profile = self.profile(tmp_path, started=False)
        updates.make(*["model", "actor"] * 5)
        profile.close()
        assert not (tmp_path / TRACE).exists()
        assert f"no {TRACE}" in capsys.readouterr().out

    def test_an_update_that_fails_is_not_counted(self, tmp_path):
        updates, _ = self.profile(tmp_path)
        updates.make(*["model", "actor"] * WARM_UP, "model")
        with pytest.raises(ValueError, match="failed"), updates.around("actor"):
            raise ValueError("failed")
        assert not (tmp_path / TRACE).exists()
        updates.make("model")
        assert updates_in(tmp_path)["model"] == 1

    def test_a_full_disk_costs_the_trace_and_not_the_run(self, tmp_path, monkeypatch, capsys):
        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(debugging.os, "replace", full)
        updates, profile = self.profile(tmp_path)
        updates.make(*["model", "actor"] * (WARM_UP + 1))
        profile.close()
        assert list(tmp_path.iterdir()) == []
        assert "No space left on device" in capsys.readouterr().err
