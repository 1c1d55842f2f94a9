"""Bytes in words.

Everything is counted in bytes and shown in binary units: 1 GiB is 2**30 bytes, 1 GB is 10**9 bytes. Where a number is
read, "GiB" and "GB" mean just that, and a bare letter ("64G") is binary, as SLURM and ``ulimit`` have it.
"""

from __future__ import annotations

import re

__all__ = ["GIB", "KIB", "MIB", "TIB", "format_bytes", "parse_bytes"]

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_LETTERS = "KMGTP"
_QUANTITY = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<letter>[kmgtp]?)(?P<kind>i?b?)\s*", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """Three digits and a binary unit: ``1.5 GiB``, ``400 MiB``, ``12 B``.

    Args:
        count (float): bytes; a difference may be negative.
    """
    value, unit = abs(float(count)), "B"
    for letter in _LETTERS:
        # 1023.7 would be shown as 1024.
        if round(value) < 1024:
            break
        value, unit = value / 1024, f"{letter}iB"
    digits = 0 if value >= 100 or unit == "B" else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    if digits:
        text = text.rstrip("0").rstrip(".")
    return f"{'-' if count < 0 and text != '0' else ''}{text} {unit}"


def parse_bytes(quantity: str | int) -> int:
    """Bytes of a quantity: ``"1.5 GiB"``, ``"64G"`` (binary), ``"48 GB"`` (decimal), ``"1024"`` or an integer (bytes).

    Args:
        quantity (str or int): the quantity, not negative.

    Raises:
        ValueError: if it is not a quantity of memory.
    """
    if isinstance(quantity, int) and not isinstance(quantity, bool) and quantity >= 0:
        return quantity
    match = _QUANTITY.fullmatch(quantity) if isinstance(quantity, str) else None
    if match is None:
        raise ValueError(f"{quantity!r} is not an amount of memory; write bytes, '1.5 GiB', '64G' or '48 GB'")
    power = " KMGTP".index(match["letter"].upper() or " ")
    base = 1000 if match["kind"].lower() == "b" else 1024
    return round(float(match["number"]) * base**power)
