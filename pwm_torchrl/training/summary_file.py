"""``summary.json`` as seen from outside of a run; needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"


def was_started(run_dir: str | Path) -> bool:
    """Whether an earlier attempt left something to continue, be it only its first lines."""
    return any((Path(run_dir) / name).exists() for name in ("checkpoints", "metrics.csv", SUMMARY_FILE))


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The run's ``summary.json``; empty while there is none or it is torn."""
    try:
        content = json.loads((Path(run_dir) / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no JSON, or no text at all
        return {}
    return content if isinstance(content, dict) else {}


def set_status(run_dir: str | Path, status: str, *, whatever_it_was: bool = False) -> None:
    """Corrects a summary that still says ``running`` although its process ended, or anything but ``finished``."""
    summary = read_summary(run_dir)
    said = summary.get("status")
    if said == "running" or (whatever_it_was and said not in (None, "finished")):
        partial = Path(run_dir) / (SUMMARY_FILE + ".tmp")
        try:
            partial.write_text(json.dumps({**summary, "status": status}, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, Path(run_dir) / SUMMARY_FILE)
        finally:
            partial.unlink(missing_ok=True)
