"""What memory an import takes: a log of the process's resident memory while chunks of several sizes are imported.

    python benchmarks/data_import.py                 # chunks of 250 MB, 1 GB and 2 GB
    python benchmarks/data_import.py --quick         # 100 and 250 MB
    python benchmarks/data_import.py --folder DIR    # where the files go; must be a disk

Each import runs in a process of its own, which reads its resident memory every 20 ms from before the import begins: all
of it, mapped pages of the chunk too. Promised: growth of at most 1.2 times the chunk and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from pwm_torchrl.data.episodes import import_chunks  # noqa: E402
from pwm_torchrl.envs.tasks import task_set  # noqa: E402
from pwm_torchrl.files import filesystem_type  # noqa: E402

MB = 10**6
LENGTH = 501
NAMES = "walker-walk,fish-swim"
EVERY_S = 0.02


def write_chunk(path: Path, size: int) -> None:
    """A chunk of random episodes of two tasks as wide as MT30's widest."""
    tasks, rng = task_set(NAMES), np.random.RandomState(0)
    episodes = size // (LENGTH * 4 * (tasks.observation_dim + tasks.action_dim + 2))
    task = torch.arange(episodes) % 2
    action = torch.rand(episodes, LENGTH, tasks.action_dim) * 2 - 1
    action[task == 1, :, tasks.action_dims[1] :] = 0
    reward = torch.rand(episodes, LENGTH)
    action[:, 0], reward[:, 0] = torch.nan, torch.nan
    obs = torch.from_numpy(rng.standard_normal((episodes, 1, tasks.observation_dim)).astype(np.float32))
    chunk = TensorDict(
        obs=obs + torch.rand(1, LENGTH, 1),
        action=action,
        reward=reward,
        task=task.int().unsqueeze(1).repeat(1, LENGTH),
        batch_size=[episodes, LENGTH],
    )
    torch.save(chunk, path)


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this benchmark needs Linux.")


def imported(source: Path, store: Path) -> dict[str, Any]:
    """What the process of one import does."""
    torch.set_num_threads(1)
    tasks, log, done = task_set(NAMES), [], threading.Event()
    start, before = time.perf_counter(), resident_bytes()

    def watch() -> None:
        while not done.is_set():
            log.append((round(time.perf_counter() - start, 3), resident_bytes()))
            done.wait(EVERY_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        import_chunks(source, store, tasks)
    finally:
        done.set()
        watcher.join()
    return {"before_bytes": before, "seconds": time.perf_counter() - start, "log": log}


def measure(folder: Path, size: int) -> dict[str, Any]:
    """One chunk's import, in a process of its own."""
    source, store = folder / "chunk_0.pt", folder / "store"
    # The chunk is made in a process too: memory that this one keeps would be the next one's disk cache.
    subprocess.run([sys.executable, __file__, "--write", str(source), str(size)], check=True)
    command = [sys.executable, __file__, "--import", str(source), str(store)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    size = source.stat().st_size
    for file in (source, *store.iterdir()):
        file.unlink()
    store.rmdir()
    growth = max(value for _, value in found["log"]) - found["before_bytes"]
    return {"chunk_bytes": size, "growth_bytes": growth, "allowed_bytes": int(1.2 * size + 500 * MB), **found}


def table(found: dict[str, Any]) -> str:
    """The result for people: growth by chunk size, and the log of the largest."""
    runs = found["runs"]
    lines = [
        "# Memory of an import",
        "",
        f"`python benchmarks/data_import.py`, {found['date']}, {found['hardware']}, file system {found['filesystem']}.",
        "Resident memory of a process that imports one chunk of TD-MPC2's format, including mapped pages of the chunk.",
        "",
        "| chunk, MB | growth, MB | allowed (1.2 chunks + 500 MB), MB | seconds |",
        "|---:|---:|---:|---:|",
    ]
    for run in runs:
        sizes = (run[name] / MB for name in ("chunk_bytes", "growth_bytes", "allowed_bytes"))
        lines.append(f"| {' | '.join(f'{size:,.0f}' for size in sizes)} | {run['seconds']:.1f} |")
    last = runs[-1]
    steps = np.linspace(0, len(last["log"]) - 1, 16).astype(int)
    lines += [
        "",
        "During the import of the last chunk (checksums first, then the copy); before it "
        f"{last['before_bytes'] / MB:.0f} MB.",
        "",
        "| second | " + " | ".join(f"{last['log'][step][0]:.1f}" for step in steps) + " |",
        "|---|" + "---:|" * len(steps),
        "| MB | " + " | ".join(f"{last['log'][step][1] / MB:.0f}" for step in steps) + " |",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write the table; 0 if no import took more than is promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller chunks")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result and the whole log to this file"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for the files (default: a temporary one)")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--import", nargs=2, help=argparse.SUPPRESS, dest="imported")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()
    if args.write:
        write_chunk(Path(args.write[0]), int(args.write[1]))
        return 0
    if args.imported:
        print(json.dumps(imported(*map(Path, args.imported))))
        return 0
    sizes = (100, 250) if args.quick else (250, 1000, 2000)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found = {
            "runs": [measure(Path(name), size * MB) for size in sizes],
            "filesystem": filesystem_type(Path(name)) or "unknown",
            "date": date.today().isoformat(),
            "hardware": hardware(),
        }
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.publish:
        (ROOT / "benchmarks" / "results" / "data_import.md").write_text(table(found), encoding="utf-8")
    return 0 if all(run["growth_bytes"] <= run["allowed_bytes"] for run in found["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
