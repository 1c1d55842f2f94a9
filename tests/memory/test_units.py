"""Formatting and parsing of amounts of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwm_torchrl.memory.readings import GIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (400 * MIB, "400 MiB"),
        (1.5 * GIB, "1.5 GiB"),
        (12.34 * GIB, "12.3 GiB"),
        (GIB - 1, "1 GiB"),  # not 1024 MiB
        (2**60, "1024 PiB"),
        (-3 * MIB, "-3 MiB"),
        (-0.1, "0 B"),
    ],
)
def test_format(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (12, 12),
        ("1024", 1024),
        ("1 B", 1),
        ("64G", 64 * GIB),  # SLURM's --mem=64G
        ("64 Gi", 64 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("48 GB", 48 * 10**9),
        ("2tb", 2 * 10**12),
        (" 512 k ", 512 * 1024),
    ],
)
def test_parse(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "64 X", "-1", "1 2", "1e9", "inf", -1, True, 1.5, None])
def test_refuses_invalid_amounts(text):
    with pytest.raises(ValueError, match="not an amount of memory"):
        parse_bytes(text)


@given(st.integers(0, 2**59))
def test_round_trip_to_three_digits(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.0051)
