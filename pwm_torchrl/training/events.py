"""``events.jsonl``: what happened to a run, one JSON object per line, appended by every attempt."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


def write_event(run_dir: Path, event: str, **details: Any) -> None:
    """Append an event with the time (UTC, ISO 8601).

    Args:
        run_dir (Path): the run's directory.
        event (str): ``start``, ``resume``, ``finished``, ``stopped`` or ``failed``.
        details: plain values.
    """
    record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details}
    with (run_dir / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
