"""Replay on disk: how long sampling takes beside RAM, and whether a store much larger than memory can be lived with.

    python benchmarks/replay_disk.py                 # a store of 8 GiB in a memory cgroup of 2 GiB
    python benchmarks/replay_disk.py --quick         # 2 GiB in 512 MiB, of which importing torch takes half
    python benchmarks/replay_disk.py --folder DIR    # where the files go; must be a disk

*Speed.* 1024 slices of 16 steps, Ant's dimensions, from a replay in memory and from one on disk whose pages the kernel
has cached, in turns; the median, and the ratio of the medians.

*Limit.* A process of its own in a memory cgroup (version 1 or 2) fills a store four times larger than the group's limit
and samples from all of it. Reported: the group's peak, which includes the page cache and therefore reaches the limit in
perfect health, and the process's anonymous memory, which is what could not be taken back. In sampling there, about a
quarter of the store is cached, the rest is read from the disk (a virtual one may have a cache of its own). Where no
cgroup can be made, the reason is reported instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from pwm_torchrl.data import TrajectoryReplay  # noqa: E402
from pwm_torchrl.files import filesystem_type  # noqa: E402
from pwm_torchrl.memory.cgroups import memory_cgroups  # noqa: E402
from pwm_torchrl.memory.storage import replay_bytes  # noqa: E402
from pwm_torchrl.run.train import quiet_torchrl  # noqa: E402

OBSERVATION_DIM, ACTION_DIM, ENVS, HORIZON = 37, 8, 128, 16
SLICES = 1024
MIB = 2**20


def random_batch(steps: int) -> TensorDict:
    """Random steps ``[N, T]``, which no file system can compress."""
    flag = torch.zeros(ENVS, steps, 1, dtype=torch.bool)
    following = TensorDict(
        observation=torch.randn(ENVS, steps, OBSERVATION_DIM),
        reward=torch.randn(ENVS, steps, 1),
        done=flag,
        terminated=flag.clone(),
        batch_size=[ENVS, steps],
    )
    return TensorDict(
        observation=torch.randn(ENVS, steps, OBSERVATION_DIM),
        action=torch.randn(ENVS, steps, ACTION_DIM),
        next=following,
        batch_size=[ENVS, steps],
    )


def fill(replay: TrajectoryReplay, after: Callable[[], None] = lambda: None) -> None:
    """Write until the oldest steps have been dropped."""
    batch = random_batch(64)
    while replay.steps < 1.1 * replay.capacity:
        replay.extend(batch)
        after()


def compare(capacity: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Sampling times of both storages, measured in turns."""
    torch.set_num_threads(1)
    replays = {
        "memory": TrajectoryReplay(capacity, ENVS, HORIZON),
        "disk": TrajectoryReplay(capacity, ENVS, HORIZON, "disk", folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for replay in replays.values():
        fill(replay)
    for _ in range(repeats):
        for name, replay in replays.items():
            start = time.perf_counter()
            replay.sample_slices(SLICES)
            seconds[name].append(time.perf_counter() - start)
    found = {f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()}
    return {
        "transitions": capacity,
        "store_bytes": replay_bytes(OBSERVATION_DIM, ACTION_DIM, capacity, ENVS),
        "repeats": repeats,
        **found,
        "disk_to_memory": found["disk_ms"] / found["memory_ms"],
    }


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or newer.")


def live_in_the_group(capacity: int, repeats: int, folder: Path) -> dict[str, Any]:
    """What the process in the cgroup does: fill and sample, noting its anonymous memory."""
    torch.set_num_threads(1)
    readings = [anonymous_bytes()]
    replay = TrajectoryReplay(capacity, ENVS, HORIZON, "disk", folder)

    def read() -> None:
        readings.append(anonymous_bytes())

    start = time.perf_counter()
    fill(replay, read)
    replay.state_dict()  # waits for the disk, as a checkpoint does
    filled = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        replay.sample_slices(SLICES)
        seconds.append(time.perf_counter() - start)
        read()
    return {
        "written_bytes": replay_bytes(OBSERVATION_DIM, ACTION_DIM, replay.collected, ENVS),
        "fill_s": filled,
        "cold_sample_ms": 1e3 * median(seconds),
        "anonymous_first_bytes": readings[0],
        "anonymous_peak_bytes": max(readings),
    }


@contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """A new memory cgroup with a limit.

    Raises:
        OSError: if none can be made, with the reason.
    """
    groups = memory_cgroups()
    if not groups:
        raise OSError("this system has no memory cgroups")
    directory = groups[0].path / "pwm_torchrl_replay_disk"
    directory.mkdir()
    try:
        file = directory / ("memory.max" if groups[0].version == 2 else "memory.limit_in_bytes")
        if not file.exists():
            raise OSError(f"{groups[0].path} does not delegate the memory controller")
        file.write_text(str(limit), encoding="ascii")
        yield directory
    finally:
        directory.rmdir()


def under_limit(limit: int, capacity: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Run :func:`live_in_the_group` in a cgroup; what it found, or why it could not be run."""
    size = replay_bytes(OBSERVATION_DIM, ACTION_DIM, capacity, ENVS)
    found: dict[str, Any] = {"limit_bytes": limit, "store_bytes": size}
    try:
        with limited_group(limit) as group:
            # The shell joins the group and becomes the process, so that all its memory counts.
            member = [sys.executable, __file__, "--member", str(capacity), str(repeats), str(folder)]
            join = 'echo $$ > "$0" && exec "$@"'
            child = subprocess.run(
                ["sh", "-c", join, group / "cgroup.procs", *member], capture_output=True, text=True, check=False
            )
            peak = next(f for f in (group / "memory.peak", group / "memory.max_usage_in_bytes") if f.exists())
            found |= {"survived": child.returncode == 0, "group_peak_bytes": int(peak.read_text(encoding="ascii"))}
    except (OSError, StopIteration) as error:
        return {**found, "not_run": str(error)}
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return {**found, "died": f"exit code {child.returncode}: {last}"}
    return {**found, **json.loads(child.stdout.splitlines()[-1])}


def table(found: dict[str, Any], quick: bool) -> str:
    """The result for people."""
    speed, limit = found["speed"], found["limit"]
    rows = {
        f"sample {SLICES} x {HORIZON}, memory, ms": f"{speed['memory_ms']:.1f}",
        "the same from disk, cached, ms": f"{speed['disk_ms']:.1f}",
        "disk / memory": f"{speed['disk_to_memory']:.2f}",
        "store / limit of the cgroup, MiB": f"{limit['store_bytes'] / MIB:.0f} / {limit['limit_bytes'] / MIB:.0f}",
    }
    if limit.get("survived"):
        rows |= {
            "written in total, MiB": f"{limit['written_bytes'] / MIB:.0f} in {limit['fill_s']:.0f} s",
            "sample from disk, most of it not cached, ms": f"{limit['cold_sample_ms']:.1f}",
            "peak of the cgroup, page cache included, MiB": f"{limit['group_peak_bytes'] / MIB:.0f}",
            "anonymous memory, before and at its peak, MiB": f"{limit['anonymous_first_bytes'] / MIB:.0f}, "
            f"{limit['anonymous_peak_bytes'] / MIB:.0f}",
            "survived": "yes",
        }
    else:
        rows["survived"] = limit.get("died") or f"not run: {limit['not_run']}"
    lines = [
        "# Replay on disk",
        "",
        f"`python benchmarks/replay_disk.py{' --quick' if quick else ''}`, {found['date']}, {found['hardware']}.",
        f"{OBSERVATION_DIM} observations, {ACTION_DIM} actions, {ENVS} environments, one thread, file system "
        f"{found['filesystem']}; speed with a replay of {speed['transitions']:,} transitions "
        f"({speed['store_bytes'] / MIB:.0f} MiB), median of {speed['repeats']}. On a machine shared with other work: "
        "only the ratio counts.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write the table; 0 unless the process in the cgroup died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller store and limit")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--member", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()
    if args.member:
        capacity, repeats, folder = args.member
        print(json.dumps(live_in_the_group(int(capacity), int(repeats), Path(folder))))
        return 0
    quiet_torchrl()
    limit = 512 * MIB if args.quick else 2048 * MIB
    per_transition = replay_bytes(OBSERVATION_DIM, ACTION_DIM, 1, 1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        found = {
            "speed": compare(100_000 if args.quick else 1_000_000, 10 if args.quick else 50, folder / "speed"),
            "limit": under_limit(limit, 4 * limit // per_transition, 5 if args.quick else 50, folder / "limit"),
            "filesystem": filesystem_type(folder) or "unknown",
            "date": date.today().isoformat(),
            "hardware": hardware(),
        }
    print(table(found, args.quick))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    if args.publish:
        results = ROOT / "benchmarks" / "results"
        (results / "replay_disk.json").write_text(text, encoding="utf-8")
        (results / "replay_disk.md").write_text(table(found, args.quick), encoding="utf-8")
    return 1 if "died" in found["limit"] else 0


if __name__ == "__main__":
    sys.exit(main())
