"""What tests read of a run's directory."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

from pwm_torchrl.run.checkpoints import CheckpointStore


def summary_of(run_dir: Path) -> dict[str, Any]:
    """``summary.json``."""
    return json.loads((run_dir / "summary.json").read_text())


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """``events.jsonl``, or those of one kind."""
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    """``metrics.csv``, memory included."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def saved_epochs(run_dir: Path) -> list[int]:
    """Epochs of which there is a checkpoint."""
    return [saved.epoch for saved in CheckpointStore(run_dir).resume_candidates()]


def watching_threads() -> list[threading.Thread]:
    """Threads that watch memory."""
    return [thread for thread in threading.enumerate() if thread.name == "memory-watch"]
