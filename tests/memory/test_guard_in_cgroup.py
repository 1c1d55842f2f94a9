"""The guard in a real cgroup of 400 MB: page cache raises no alarm, a leak does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cgroup_cases import limited_cgroup

from pwm_torchrl.memory.readings import MIB

ROOT = Path(__file__).parents[2]
LIMIT = 400 * MIB
TOUCHED = 600 * MIB

JOIN = """
import json, mmap, os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
from pwm_torchrl.memory.watch import MemoryGuard
from pwm_torchrl.memory.watch import MemoryWatch
watch, guard = MemoryWatch(), MemoryGuard()
assert guard.check(watch.sample()) is None
"""

READ = """
with open(sys.argv[2], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    for start in range(0, len(mapped), 2**24):
        for offset in range(start, min(start + 2**24, len(mapped)), mmap.PAGESIZE):
            mapped[offset]
        reading = watch.sample()
        alarm = guard.check(reading)
        assert alarm is None, alarm.message
group = reading.cgroups[0]
print(json.dumps({"usage": group.usage, "limit": group.limit, "unreclaimable": group.unreclaimable,
                  "peak": watch.peaks["memory/cgroup_usage"], "metrics": reading.metrics()}))
"""

LEAK = """
leaked = []
while (alarm := guard.check(watch.sample())) is None and len(leaked) < 150:
    leaked.append(b"x" * 2**22)
print(json.dumps({"leaked": len(leaked) * 2**22, "message": alarm.message, "fraction": alarm.fraction,
                  "grew": alarm.growth[0].kind}))
"""


def in_group(directory: Path, code: str, *arguments: object) -> dict:
    """Run a script in the group; returns what it prints."""
    command = [sys.executable, "-c", JOIN + code, str(directory), *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    # -9 is the kernel's kill.
    assert out.returncode == 0, f"{out.returncode}: {out.stderr}"
    return json.loads(out.stdout)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file on disk that is not in the page cache; a page is charged to the group that reads it first."""
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = {mount[mount.index("-") + 1] for mount in mounts if mount[2] == number}
    if kinds & {"tmpfs", "ramfs"}:
        pytest.skip(f"{tmp_path} is not on a disk")
    path = tmp_path / "large"
    with path.open("wb", buffering=0) as file:
        for _ in range(TOUCHED // (8 * MIB)):
            file.write(os.urandom(MIB) * 8)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_reading_a_large_mapped_file_raises_no_alarm(large_file):
    with limited_cgroup(LIMIT) as directory:
        found = in_group(directory, READ, large_file)
    assert found["limit"] == LIMIT
    assert found["peak"] > 0.9 * LIMIT  # by its usage alone, the group looks full
    assert found["unreclaimable"] < 0.2 * LIMIT
    assert found["metrics"]["memory/cgroup_limit"] == LIMIT
    assert found["metrics"]["memory/file"] > 0.5 * LIMIT


def test_a_leak_raises_an_alarm_before_the_kernel_kills():
    with limited_cgroup(LIMIT) as directory:
        found = in_group(directory, LEAK)
    assert 0.7 * LIMIT < found["leaked"] < 0.9 * LIMIT
    assert 0.85 <= found["fraction"] < 0.9
    assert found["grew"] == "anonymous memory of the main process"
    assert directory.name in found["message"]


def test_without_the_guard_the_kernel_kills():
    """The same leak without a guard; shows that the previous test can fail."""
    with limited_cgroup(LIMIT) as directory:
        command = [sys.executable, "-c", JOIN + "guard.check = lambda reading: None" + LEAK, str(directory)]
        out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert out.returncode == -9, out.stderr
