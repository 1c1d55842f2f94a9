"""The process that stays beside a job's program: it passes signals on and tells how the program ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pwm_torchrl.cluster import supervise

SCRIPT = Path(supervise.__file__)
TELLS_SIGNALS = """
import signal, sys
def told(signum, frame):
    print(signal.Signals(signum).name, flush=True)
    if signum == signal.SIGTERM:
        sys.exit(5)
for each in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(each, told)
print("ready", flush=True)
while True:
    signal.pause()
"""


@contextlib.contextmanager
def supervised(tmp_path, code, **environ):
    command = [sys.executable, "-S", str(SCRIPT), str(tmp_path / "evidence"), sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}) as process:
        yield process
        process.kill()


def evidence(tmp_path, rank=0):
    return json.loads((tmp_path / f"evidence-{rank}.json").read_text())


@pytest.mark.parametrize(
    ("code", "returncode", "expected"),
    [("", 0, 0), ("raise SystemExit(7)", 7, 7), ("import os; os.kill(os.getpid(), 9)", -9, 137)],
)
def test_ends_as_the_program_did(code, returncode, expected, tmp_path):
    with supervised(tmp_path, code, SLURM_PROCID="3") as process:
        assert process.wait(20) == expected
    told = evidence(tmp_path, 3)
    assert (told["returncode"], told["signals"], told["preempted"]) == (returncode, {}, False)
    assert told["oom_kills"] in (0, None)
    assert told["ended"] >= told["started"]


def test_passes_signals_on(tmp_path):
    with supervised(tmp_path, TELLS_SIGNALS) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.readline() == "SIGUSR2\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        assert process.wait(20) == 5
    assert list(evidence(tmp_path)["signals"]) == ["SIGUSR2", "SIGTERM"]


@pytest.mark.parametrize(
    ("table", "file", "text"),
    [
        ("4:cpu:/x\n9:memory:/job_1/step_0\n", "memory/job_1/step_0/memory.oom_control", "under_oom 0\noom_kill 3\n"),
        ("0::/job_1/step_0\n", "job_1/step_0/memory.events", "oom 4\noom_kill 3\noom_group_kill 0\n"),
    ],
    ids=["v1", "v2"],
)
def test_counts_kills_of_either_version_of_cgroups(table, file, text, tmp_path, monkeypatch):
    counter = tmp_path / file
    counter.parent.mkdir(parents=True)
    counter.write_text(text)
    monkeypatch.setattr(supervise, "_CGROUPS", tmp_path)
    read = supervise._read
    monkeypatch.setattr(supervise, "_read", lambda path: table if path == Path("/proc/self/cgroup") else read(path))
    assert supervise.oom_kills() == 3


def test_a_kernel_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(supervise, "_read", lambda path: "")
    assert supervise.oom_kills() is None


def test_a_full_disk_does_not_hide_the_end(tmp_path, capfd):
    (tmp_path / "file").touch()
    code = supervise.main([str(tmp_path / "file" / "evidence"), sys.executable, "-c", "raise SystemExit(3)"])
    assert code == 3
    assert "could not write" in capfd.readouterr().err
