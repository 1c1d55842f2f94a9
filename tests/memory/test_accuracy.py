"""Predicted memory compared with real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_accuracy.py"


@pytest.mark.slow
def test_predictions_match_runs(tmp_path):
    """The benchmark's quick rows: within 10 % or 64 MiB."""
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2
    assert all(row["within"] for row in rows)
