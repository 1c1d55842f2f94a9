"""A replay on disk that is much larger than the memory limit of its process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pwm_torchrl.files import MEMORY_FILESYSTEMS, filesystem_type

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.mark.slow
def test_a_replay_larger_than_memory(tmp_path):
    """The quick benchmark: 2 GiB in a cgroup of 512 MiB, half of which PyTorch takes."""
    kind = filesystem_type(tmp_path)
    if kind in MEMORY_FILESYSTEMS:
        pytest.skip(f"temporary folders are on a {kind} file system, which is RAM")
    result = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/replay_disk.py", "--quick", "--json", str(result), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.exists(), done.stderr
    found = json.loads(result.read_text())
    assert found["speed"]["disk_to_memory"] > 0
    limit = found["limit"]
    if "not_run" in limit:
        pytest.skip(f"cannot limit the memory of a process: {limit['not_run']}")
    assert limit.get("survived"), limit
    assert done.returncode == 0
    assert limit["store_bytes"] > 3.9 * limit["limit_bytes"]
    assert limit["written_bytes"] > limit["store_bytes"]
    assert limit["group_peak_bytes"] <= limit["limit_bytes"]
    # The store adds a batch, what is sampled and a little bookkeeping, not its size.
    assert limit["anonymous_peak_bytes"] - limit["anonymous_first_bytes"] < 64 * MIB
