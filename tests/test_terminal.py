"""What is told of a run's progress, as lines and in a file; colours."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest

from pwm_torchrl import terminal
from pwm_torchrl.progress import progress_here
from pwm_torchrl.terminal import PROGRESS_LINE, Lines, Progress, State, StateFile, coloured, joined, say_after_interrupt


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes stdout a terminal that shows colours; not as a fixture, since pytest sets stdout again after those."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def lines_of(act) -> list[str]:
    """The lines that are written while ``act(progress, sleep)`` reports; ``sleep`` shows it four times a second."""
    clock, written = Clock(), []
    progress = Progress([Lines(written.append)], clock, ticking=False)

    def sleep(seconds: float) -> None:
        for _ in range(round(4 * seconds)):
            progress.tick()
            clock.now += 0.25
        progress.tick()

    with progress:
        act(progress, sleep)
    return written


class TestLines:
    def test_there_is_one_every_ten_seconds_and_one_for_the_last_epoch(self):
        def act(progress, sleep):
            progress.begin(8, 0, 0, 8000, {})
            for epoch in range(1, 9):
                sleep(3)
                progress.epoch(epoch, 1000 * epoch, {"return": -100.0 + epoch})

        assert [line.split(", ")[0] for line in lines_of(act)] == [
            "[0:00:10] return -97.0", "[0:00:20] return -94.0", "[0:00:24] return -92.0"
        ]  # fmt: skip
        assert all(PROGRESS_LINE.match(line) for line in lines_of(act))

    def test_return_environment_steps_and_time_left_come_first(self):
        def act(progress, sleep):
            progress.begin(3, 0, 0, 36_900, {})
            sleep(5)
            progress.epoch(1, 12_300, {"return": -512.34, "best": -400.0, "model loss": 0.01234})
            sleep(5)
            progress.epoch(2, 24_600, {"return": 1234.5})
            sleep(5)
            progress.epoch(3, 36_900, {})

        first, last = lines_of(act)
        assert first == "[0:00:10] return -512.3, 12.3k/36.9k env steps, epoch 1/3, best -400.0, model loss 0.0123"
        assert last == (
            "[0:00:15] return 1,234.5, 36.9k/36.9k env steps, epoch 3/3, best -400.0, 2,460 steps/s, model loss 0.0123"
        )

    def test_a_long_phase_is_named_before_there_is_any_epoch(self):
        def act(progress, sleep):
            with progress.phase("planning memory"):
                sleep(12)
            progress.begin(2, 0, 0, 0, {})
            with progress.phase("fitting the model", 500) as count:
                for _ in range(120):
                    count()
                sleep(10)

        assert lines_of(act) == ["[0:00:10] planning memory 0:10", "[0:00:20] epoch 0/2, fitting the model 120/500"]

    def test_a_short_phase_is_not_named(self):
        def act(progress, sleep):
            progress.begin(50, 0, 0, 0, {})
            for epoch in range(1, 41):
                with progress.phase("evaluating"):
                    sleep(0.5)
                progress.epoch(epoch, 0, {})

        assert lines_of(act)
        assert not [line for line in lines_of(act) if "evaluating" in line]

    def test_a_run_that_was_stopped_ends_without_another_line(self):
        def act(progress, sleep):
            progress.begin(5, 0, 0, 0, {})
            progress.epoch(1, 0, {})

        assert lines_of(act) == []

    def test_a_full_disk_ends_no_run(self):
        def full(line):
            raise OSError(28, "No space left on device")

        screen = Lines(full)
        state = State(0.0, epoch=3, epochs=3)
        screen.show(state, 0.0)
        screen.show(state, 20.0)
        assert screen.shown == 20.0


class TestProgress:
    def test_time_left_is_of_the_newest_epochs_that_are_typical(self):
        clock = Clock()
        progress = Progress(clock=clock)
        progress.begin(100, 0, 0, 1000, {})
        for epoch, (seconds, typical) in enumerate([(0.1, False), (0.1, False), (300, True), (2, True), (2, True)], 1):
            clock.now += seconds
            progress.epoch(epoch, 10 * epoch, {}, typical=typical)
            assert (progress.state.left(clock.now) is None) == (epoch < 4)
        assert progress.state.left(clock.now) == pytest.approx(95 * 2)
        assert progress.state.left(clock.now + 1) == pytest.approx(94 * 2 + 1)
        assert progress.state.left(clock.now + 60) == pytest.approx(94 * 2)  # of an epoch that takes longer
        assert progress.state.speed == pytest.approx(5)

    def test_a_resumed_run_goes_on_from_its_epoch(self):
        clock = Clock()
        progress = Progress(clock=clock)
        progress.begin(20, 10, 1000, 2000, {"return": -5.0})
        assert progress.state.left(clock.now) is None
        for epoch in (11, 12):
            clock.now += 3
            progress.epoch(epoch, 100 * epoch, {})
        assert progress.state.left(clock.now) == pytest.approx(8 * 3)
        assert progress.state.values == {"return": -5.0}

    def test_after_a_phase_the_one_around_it_goes_on(self):
        clock = Clock()
        progress = Progress(clock=clock)
        with progress.phase("evaluating"):
            clock.now += 7
            with pytest.raises(KeyError), progress.phase("saving", 3):
                raise KeyError
            assert progress.state.phase_text(clock.now) == "evaluating 0:07"
        assert progress.state.phase == ""

    def test_a_phase_in_pieces_counts_from_its_first(self):
        clock = Clock()
        progress = Progress(clock=clock)
        for done in (0, 64):
            with progress.phase("collecting the first steps", 128, done, pieces=True):
                clock.now += 0.7
                text = progress.state.phase_text(clock.now)
        assert text == "collecting the first steps 64/128"

    def test_no_thread_runs_where_processes_may_be_forked(self):
        import threading

        shown = []

        class Screen:
            def show(self, state, now):
                shown.append((state.phase_text(now), threading.current_thread().name))

            def close(self, state, now): ...

        def named() -> bool:
            return "progress" in {thread.name for thread in threading.enumerate()}

        with Progress([Screen()]) as progress:
            assert named()
            with progress.phase("opening the environments", forks=True):
                assert not named()
                assert shown[-1] == ("opening the environments", threading.main_thread().name)
            assert named()
        assert not named()

    def test_nothing_is_shown_where_that_is_not_wanted(self, monkeypatch, tmp_path):
        monkeypatch.setenv(terminal.STATE_VARIABLE, str(tmp_path / "state"))
        assert progress_here(enabled=False).screens == ()
        lines, file = progress_here(enabled=True).screens
        assert isinstance(lines, Lines)
        assert isinstance(file, StateFile)

    def test_on_a_terminal_it_is_drawn(self, monkeypatch):
        pytest.importorskip("rich")
        on_terminal(monkeypatch)
        monkeypatch.delenv(terminal.STATE_VARIABLE, raising=False)
        (screen,) = progress_here(enabled=True).screens
        assert type(screen).__name__ == "Display"
        monkeypatch.setenv("TERM", "dumb")
        (screen,) = progress_here(enabled=True).screens
        assert isinstance(screen, Lines)


class TestStateFile:
    def test_comes_back_as_it_was(self, tmp_path):
        file = tmp_path / "progress.json"
        assert StateFile.read(file) is None
        state = State(5.0, 3, 20, 300, 2000, {"return": float("nan")}, 7.5, 2.5, None, "saving", 7.75, 1, 2)
        screen = StateFile(file)
        screen.show(state, 8.0)
        assert str(StateFile.read(file)) == str(state)  # NaN is not equal to itself

    def test_is_written_when_something_has_changed(self, tmp_path):
        file = tmp_path / "progress.json"
        screen, state = StateFile(file), State(5.0)
        screen.show(state, 8.0)
        file.unlink()
        screen.show(state, 8.25)
        assert not file.exists()
        screen.show(replace(state, epoch=1), 8.5)
        assert json.loads(file.read_text())["epoch"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]

    def test_a_folder_that_is_gone_ends_no_run(self, tmp_path):
        StateFile(tmp_path / "gone" / "progress.json").show(State(5.0), 8.0)


class TestColours:
    def test_words_of_state_are_coloured_on_a_terminal(self, monkeypatch):
        pytest.importorskip("rich")
        on_terminal(monkeypatch)
        assert coloured("ok      ") == "\x1b[32mok\x1b[0m      "
        assert coloured("2 finished, 1 failed") == "2 \x1b[32mfinished\x1b[0m, 1 \x1b[1;31mfailed\x1b[0m"
        assert coloured("broken") == "broken"  # not "ok" inside

    @pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
    def test_not_with_no_color_or_a_dumb_terminal(self, monkeypatch, name):
        on_terminal(monkeypatch)
        monkeypatch.setenv(name, "dumb")
        assert coloured("failed") == "failed"

    def test_not_in_a_file(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TERM", "xterm-256color")
        with open(tmp_path / "out", "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert coloured("failed") == "failed"

    def test_without_rich_they_are_plain(self, monkeypatch):
        on_terminal(monkeypatch)
        monkeypatch.setattr(terminal, "find_spec", lambda name: None)
        assert coloured("failed") == "failed"


class TestJoined:
    PARTS = ("seed 0: finished", "final return -150.2", "epochs 14/14", "/a/path/of/a/run")

    def test_a_narrow_terminal_breaks_between_parts(self, monkeypatch):
        pytest.importorskip("rich")
        on_terminal(monkeypatch)
        monkeypatch.setattr(terminal, "_columns", lambda stream: 38)
        parts = [coloured(part) for part in self.PARTS]
        assert joined(parts).split("\n") == [
            "seed 0: \x1b[32mfinished\x1b[0m · final return -150.2", "  epochs 14/14 · /a/path/of/a/run"
        ]  # fmt: skip
        monkeypatch.setattr(terminal, "_columns", lambda stream: 10)
        assert [line.strip() for line in joined(self.PARTS).split("\n")] == list(self.PARTS)

    def test_elsewhere_it_is_one_line(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert joined(self.PARTS) == " · ".join(self.PARTS)


def test_after_ctrl_c_a_line_begins_on_a_terminal_only(monkeypatch):
    screen = on_terminal(monkeypatch)
    say_after_interrupt("stopping")
    assert screen.getvalue() == "\nstopping\n"
    monkeypatch.setattr(sys, "stdout", plain := io.StringIO())
    say_after_interrupt("stopping")
    assert plain.getvalue() == "stopping\n"
