"""Times as SLURM writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwm_torchrl.cluster.slurm import from_minutes, to_minutes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("24:00:00", 1440),
        ("1-0", 1440),
        ("2-12:30", 3630),
        ("7-00:00:00", 10080),
        ("00:00:30", 1),
        ("infinite", None),
        ("UNLIMITED", None),
        ("n/a", None),
    ],
)
def test_every_way_of_writing(text, minutes):
    assert to_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "1.5", "1-2:3:4:5"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="is not a SLURM time limit"):
        to_minutes(text)


@given(st.integers(0, 10**6))
def test_there_and_back(minutes):
    assert to_minutes(from_minutes(minutes)) == minutes
