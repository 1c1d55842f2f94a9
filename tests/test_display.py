"""What a terminal of some width shows of a run's progress."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest

pytest.importorskip("rich")

from pwm_torchrl.display import Display, SteadyConsole
from pwm_torchrl.terminal import State

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NOW = 1000.0
VALUES = {"return": -512.3, "best": -400.0, "training return": -600.0, "model loss": 0.0123, "actor loss": -1.5}
TRAINING = State(
    NOW - 100, 12, 20, 24_600, 40_960, VALUES, NOW, 5.25, 468.0, "fitting the model", NOW - 30, 120, 500
)  # fmt: skip
FIELDS = [
    "return -512.3", "24.6k/41k env steps", "0:42 left", "best -400.0", "468 steps/s", "training return -600.0",
    "model loss 0.0123", "actor loss -1.5",
]  # fmt: skip


class Screen(io.StringIO):
    """A terminal of a size that can change, which keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def display(width: int) -> tuple[Display, Screen]:
    """A display on a terminal of ``width`` columns."""
    screen = Screen()
    return Display(SteadyConsole(screen, width=width, height=24)), screen


def frame(state: State, width: int) -> list[str]:
    """The lines of a state on a terminal of ``width`` columns."""
    shown, screen = display(width)
    shown.show(state, NOW)
    text = ESCAPE.sub("", screen.getvalue()).replace("\r", "")
    shown.close()
    return text.split("\n")


class TestWidth:
    @pytest.mark.parametrize("width", [*range(1, 60), 80, 100, 200])
    def test_no_line_is_wider_and_the_return_comes_first(self, width):
        lines = frame(TRAINING, width)
        assert len(lines) == 2
        assert max(len(line) for line in lines) <= max(0, width - 2)
        assert lines[0] == "" or "return -512.3".startswith(lines[0].split("  ")[0])

    def test_fields_leave_in_the_order_of_their_ranks(self):
        seen = []
        for width in range(200, 14, -1):
            fields = frame(TRAINING, width)[0].split("  ")
            assert fields == FIELDS[: len(fields)], width
            seen.append(len(fields))
        assert seen == sorted(seen, reverse=True)
        assert set(seen) == set(range(1, len(FIELDS) + 1))

    def test_80_columns_have_return_steps_time_left_bar_epoch_and_phase(self):
        numbers, bar = frame(TRAINING, 80)
        assert numbers == "return -512.3  24.6k/41k env steps  0:42 left  best -400.0  468 steps/s"
        assert re.fullmatch(r"[━╸╺]{37}  epoch 12/20  fitting the model 120/500", bar)

    def test_50_columns_have_them_too(self):
        numbers, bar = frame(TRAINING, 50)
        assert numbers == "return -512.3  24.6k/41k env steps  0:42 left"
        assert re.fullmatch(r"[━╸╺]{7}  epoch 12/20  fitting the model 120/500", bar)

    def test_without_room_the_bar_goes_first_then_the_epoch(self):
        assert frame(TRAINING, 44)[1] == "epoch 12/20  fitting the model 120/500"
        assert frame(TRAINING, 39)[1] == "fitting the model 120/500"
        assert frame(TRAINING, 20)[1] == "fitting the model "

    def test_the_bar_keeps_its_length_when_a_phase_is_named(self):
        def length(state: State) -> int:
            return len(re.match("[━╸╺]*", frame(state, 80)[1])[0])

        assert length(TRAINING) == length(replace(TRAINING, phase="")) == length(replace(TRAINING, phase="saving"))

    def test_the_terminals_own_size_is_followed(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("os.get_terminal_size", lambda *descriptor: (63, 20))
        assert SteadyConsole(Screen()).width == 63


class TestPhases:
    def test_before_training_there_is_only_the_phase(self):
        assert frame(State(NOW - 20, phase="planning memory", phase_since=NOW - 12), 80) == ["planning memory 0:12"]
        assert frame(State(NOW - 20, phase="planning memory", phase_since=NOW - 0.5), 80) == [""]

    def test_training_on_stored_episodes_has_validation_and_no_steps(self):
        values = {"validation": 0.01234, "model loss": 0.02}
        state = State(NOW - 100, 12, 20, 0, 0, values, NOW, 5.25, None, "validating", NOW - 3)
        numbers, bar = frame(state, 80)
        assert numbers == "validation 0.0123  0:42 left  model loss 0.02"
        assert bar.endswith("  epoch 12/20  validating")


class TestDrawing:
    def test_what_is_printed_goes_above(self):
        shown, screen = display(80)
        shown.show(TRAINING, NOW)
        screen.truncate(screen.seek(0))
        shown.console.print("a line " + "x" * 100)
        text = ESCAPE.sub("", screen.getvalue()).replace("\r", "")
        assert text.startswith("a line " + "x" * 100 + "\nreturn -512.3")  # in one piece: the terminal breaks it
        shown.close()

    def test_the_second_picture_is_drawn_over_the_first(self):
        shown, screen = display(80)
        shown.show(TRAINING, NOW)
        screen.truncate(screen.seek(0))
        shown.show(TRAINING, NOW)
        assert screen.getvalue().startswith("\r\x1b[2K\x1b[1A\x1b[2K")
        assert screen.getvalue().count("\n") == 1
        shown.close()

    def test_rows_that_a_narrower_terminal_wraps_are_wiped_away(self):
        shown, screen = display(100)
        shown.show(TRAINING, NOW)
        assert all(50 < length < 100 for length in shown.drawn)
        screen.truncate(screen.seek(0))
        shown.console.width = 50
        shown.show(TRAINING, NOW)
        assert screen.getvalue().startswith("\r" + "\x1b[2K\x1b[1A" * 2 + "\r\x1b[2K\x1b[1A\x1b[2K")
        shown.close()

    def test_nothing_stays_at_the_end_and_the_cursor_is_never_hidden(self):
        shown, screen = display(80)
        shown.show(TRAINING, NOW)
        shown.close()
        assert screen.getvalue().endswith("\n\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K")
        assert "\x1b[?25l" not in screen.getvalue()

    def test_closing_what_was_never_shown_writes_nothing(self):
        shown, screen = display(80)
        shown.close()
        assert screen.getvalue() == ""

    def test_print_goes_above_and_is_put_back(self, monkeypatch):
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        shown = Display()
        shown.show(TRAINING, NOW)
        assert sys.stdout is not screen
        print("said by a library")
        shown.close()
        assert sys.stdout is screen
        assert "said by a library\n" in ESCAPE.sub("", screen.getvalue())

    def test_no_color_has_no_colours(self, monkeypatch):
        coloured, plain = (ESCAPE.findall(picture(monkeypatch, no_color)) for no_color in ("", "1"))
        assert {code[-1] for code in coloured} == {"m"}
        assert not plain


def picture(monkeypatch: pytest.MonkeyPatch, no_color: str) -> str:
    """The first picture on a terminal, with ``NO_COLOR`` set to something."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    shown = Display(SteadyConsole(screen, width=80, height=24))
    shown.show(TRAINING, NOW)
    text = screen.getvalue()
    shown.close()
    return text
