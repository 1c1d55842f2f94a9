"""The picture strip of the README: which part of a picture it shows, and that it draws a row for each episode."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.strip import LINES, PICTURE, PICTURES, Episode, draw, minus, moving_part


def moving_square(size: int, first: int, last: int) -> np.ndarray:
    """White pictures in which a dot moves along the diagonal."""
    frames = np.full((last - first, size, size, 3), 255, np.uint8)
    for t, place in enumerate(range(first, last)):
        frames[t, place, place] = 0
    return frames


def test_the_moving_part_is_a_square_around_what_moves():
    rows, columns = moving_part(moving_square(100, 30, 61))
    assert rows == columns
    assert (rows.start, rows.stop) == (26, 65)


@pytest.mark.parametrize(("first", "last"), [(0, 100), (0, 21), (79, 100)])
def test_the_moving_part_stays_inside_of_the_picture(first, last):
    rows, columns = moving_part(moving_square(100, first, last))
    assert (rows.start <= first, rows.stop >= last, rows.start >= 0, rows.stop <= 100) == (True,) * 4
    assert columns.stop - columns.start == rows.stop - rows.start


def test_still_pictures_are_shown_whole():
    assert moving_part(np.zeros((3, 40, 60, 3), np.uint8)) == (slice(0, 40), slice(0, 60))


def test_a_strip_has_a_row_for_each_episode(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    episode = Episode("task", moving_square(50, 10, 40), -np.arange(30.0), -30.0)
    draw([episode, episode], tmp_path / "made" / "strip.png")
    height, width = image.imread(tmp_path / "made" / "strip.png").shape[:2]
    assert (height, width) == (2 * (PICTURE + sum(LINES)), PICTURES * PICTURE)
    assert minus(-30.2) == "\N{MINUS SIGN}30"
