"""Times as SLURM writes them, in minutes."""

from __future__ import annotations

import math
import re

__all__ = ["UNLIMITED", "from_minutes", "to_minutes"]

#: Words for no limit.
UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "N/A")

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def to_minutes(text: str) -> int | None:
    """Minutes of a time limit, rounded up.

    Args:
        text (str): ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``,
            ``days-hours:minutes`` or ``days-hours:minutes:seconds``.

    Returns:
        int, optional: ``None`` for no limit.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip()
    if text.upper() in UNLIMITED:
        return None
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time of SLURM, such as 90, 24:00:00 or 1-12")
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    days = int(match["days"] or 0)
    return days * 24 * 60 + hours * 60 + minutes + math.ceil(seconds / 60)


def from_minutes(minutes: int) -> str:
    """``hours:minutes:00``, with days where there are any."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock
