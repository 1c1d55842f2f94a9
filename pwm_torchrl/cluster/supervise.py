"""Runs a job's program inside the step and records how it ended; started as a script, standard library only.

    python supervise.py EVIDENCE PROGRAM [ARGUMENT ...]     # writes EVIDENCE-<task>.json

SLURM reports little about why a program ended, late, and only with accounting. A small parent process knows it at once:
the program's exit code, the signals that arrived and when, and whether the kernel killed a process of the step for lack
of memory. The kernel counts such kills in the memory cgroup, which both processes share and which is removed when the
step ends. It kills the largest process, so this one survives. SLURM sends SIGUSR2 and SIGTERM only to a step's first
process, so this process forwards them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_QUERY_TIMEOUT_S = 20


def oom_kills() -> int | None:
    """Number of processes that the kernel killed in this process's memory cgroup; ``None`` if it is not available."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            text = _read(_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")
        elif not controllers:
            text = _read(_CGROUPS / path.lstrip("/") / "memory.events")
        else:
            continue
        for entry in text.splitlines():
            name, _, value = entry.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None


def is_preempted() -> bool:
    """Whether SLURM preempts this job for another one."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return False
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    return facts.get("PreemptTime", "None") not in ("None", "Unknown")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main(argv: list[str]) -> int:
    """Run the program; returns its exit code, 128 + n if signal n killed it."""
    evidence, command = Path(f"{argv[0]}-{os.environ.get('SLURM_PROCID', '0')}.json"), argv[1:]
    before, started = oom_kills(), time.time()
    received: dict[str, float] = {}
    preempted: list[bool] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(signum: int, frame: object) -> None:
        name = signal.Signals(signum).name
        if name not in received and signum == signal.SIGUSR2:
            # SLURM's record shows only now whether the cause is preemption or the time limit.
            threading.Thread(target=lambda: preempted.append(is_preempted()), daemon=True).start()
        received.setdefault(name, time.time())
        if child is not None and child.poll() is None:
            child.send_signal(signum)

    for each in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(each, forward)
    child = subprocess.Popen(command)
    for name in list(received):  # signals that arrived before the child was started
        child.send_signal(getattr(signal, name))
    code = child.wait()
    after = oom_kills()
    _write(
        evidence,
        {
            "returncode": code,
            "oom_kills": None if after is None else after - (before or 0),
            "signals": received,
            "preempted": any(preempted),
            "started": started,
            "ended": time.time(),
        },
    )
    return 128 - code if code < 0 else code


def _write(file: Path, content: dict[str, object]) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, file)
    except OSError as error:  # a full disk must not hide the program's exit code
        sys.stderr.write(f"could not write {file}: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
