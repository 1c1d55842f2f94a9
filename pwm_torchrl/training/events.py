"""``events.jsonl``: what happened to a run, one JSON object per line, appended by every attempt."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pwm_torchrl.training.append import append_text

EVENTS_FILE = "events.jsonl"


def write_event(run_dir: Path, event: str, **details: Any) -> None:
    """Append an event with the time (UTC, ISO 8601).

    Args:
        run_dir (Path): the run's directory.
        event (str): ``start``, ``resume``, ``micro_batch`` (halved), ``unsaved`` (no checkpoint after a fault),
            ``unwatched`` (memory is not watched any more), and at the end a status: ``finished``, ``stopped``,
            ``failed``, ``memory`` or ``storage``.
        details: plain values.

    Raises:
        OSError: if it cannot be written; the file is as before then.
    """
    record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details}
    with (run_dir / EVENTS_FILE).open("ab", buffering=0) as file:
        append_text(file, json.dumps(record) + "\n")
