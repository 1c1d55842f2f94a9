"""Sampling from an episode store: how long it takes, whether it grows with the store, and what a cold disk costs.

    python benchmarks/data_sampling.py                 # a store of 8 GiB read cold, in a memory cgroup of 2 GiB
    python benchmarks/data_sampling.py --quick         # smaller stores
    python benchmarks/data_sampling.py --folder DIR    # where the files go; must be a disk

Observations and actions are as wide as MT30's, episodes have 500 transitions. A batch is 1024 slices of 16 transitions,
which are 17 observations.

*Warm.* Drawing and reading a batch from a store whose pages are cached, and the same from a TorchRL replay buffer with
``SliceSampler(cache_values=True)``, set up as TD-MPC2 does, in memory, with the same data; in turns. Medians and their
ratio.

*Growth.* Drawing alone, from stores of more and more rows up to MT30's 345 million; their files are sparse, so that
only their tables take room.

*Cold.* Drawing and reading from a real store larger than the page cache it is given, by a memory cgroup of the process
that reads. Where no cgroup can be made, the store's pages are dropped before each batch instead, and the result says
so. In turns with and without asking for a batch's pages at once (``EpisodeStore.prefetch``). A virtual disk may have a
cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from benchmarks.replay_disk import limited_group  # noqa: E402
from pwm_torchrl.data.episodes import EpisodeRows, EpisodeStore, SliceIndex, StoreWriter  # noqa: E402
from pwm_torchrl.data.episodes import store as layout  # noqa: E402
from pwm_torchrl.envs.tasks import task_set  # noqa: E402
from pwm_torchrl.files import filesystem_type  # noqa: E402
from pwm_torchrl.run.train import quiet_torchrl  # noqa: E402

SLICES, HORIZON, LENGTH = 1024, 16, 500
MT30_EPISODES = 690_000
MIB = 2**20
TASKS = task_set("mt30")
ROW_BYTES = 4 * (TASKS.observation_dim + TASKS.action_dim + 1)


def random_rows(episodes: int) -> EpisodeRows:
    """Random episodes of all tasks; padding plays no part here."""
    rng, rows = np.random.RandomState(0), episodes * (LENGTH + 1)
    found = EpisodeRows(
        rng.standard_normal((rows, TASKS.observation_dim)).astype(np.float32),
        rng.uniform(-1, 1, (rows, TASKS.action_dim)).astype(np.float32),
        rng.standard_normal(rows).astype(np.float32),
        np.full(episodes, LENGTH),
        np.arange(episodes) % len(TASKS),
    )
    found.action[found.first], found.reward[found.first] = 0, 0
    return found


def real_store(path: Path, episodes: int) -> EpisodeStore:
    """A store whose bytes are on the disk."""
    block = random_rows(min(episodes, 1000))
    with StoreWriter(path, TASKS) as writer:
        for _ in range(max(1, episodes // 1000)):
            writer.append(block)
        writer.commit([])
        writer.finish()
    return EpisodeStore.open(path)


def sparse_store(path: Path, episodes: int) -> EpisodeStore:
    """A store whose data files are holes."""
    with StoreWriter(path, TASKS) as writer:
        writer.finish()
    manifest = json.loads((path / layout.MANIFEST).read_text(encoding="utf-8"))
    manifest |= {"episodes": episodes, "transitions": episodes * LENGTH}
    (path / layout.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    number = np.arange(episodes)
    table = np.stack([number * (LENGTH + 1), np.full(episodes, LENGTH), number % len(TASKS)], 1)
    np.save(path / layout.EPISODES, table)
    np.save(path / layout.RETURNS, np.zeros(episodes))
    for name, size in layout.file_sizes(manifest).items():
        os.truncate(path / name, size)
    return EpisodeStore.open(path)


def torchrl_buffer(store: EpisodeStore) -> Any:
    """The same data in the replay buffer that TD-MPC2 makes for offline data."""
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SliceSampler

    rows = np.arange(store.num_rows)
    episode = torch.from_numpy(store.episode_of(rows))
    data = TensorDict(
        obs=store.observations(rows),
        action=torch.from_numpy(np.array(store._action)),
        reward=torch.from_numpy(np.array(store._reward)),
        task=torch.from_numpy(store.task)[episode],
        episode=episode,
        batch_size=[store.num_rows],
    )
    sampler = SliceSampler(
        num_slices=SLICES, end_key=None, traj_key="episode", truncated_key=None, strict_length=True, cache_values=True
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(store.num_rows), sampler=sampler, batch_size=SLICES * (HORIZON + 1), prefetch=0
    )
    buffer.extend(data)
    return buffer


def milliseconds(function: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def warm(folder: Path, episodes: int, repeats: int) -> dict[str, Any]:
    """Ours and TorchRL's, in turns."""
    store = real_store(folder / "warm", episodes)
    index, balanced = SliceIndex(store, HORIZON), SliceIndex(store, HORIZON, balanced=True)
    buffer = torchrl_buffer(store)
    for name in (layout.OBSERVATION, layout.ACTION, layout.REWARD):
        (store.path / name).read_bytes()  # into the page cache
    calls = {
        "index": lambda: index.sample(SLICES),
        "index_balanced": lambda: balanced.sample(SLICES),
        "index_and_read": lambda: read_batch(store, index, False),
        "index_and_read_prefetched": lambda: read_batch(store, index, True),
        "slice_sampler": lambda: buffer.sample(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        for name, call in calls.items():
            took = milliseconds(call)
            if repeat >= 3:  # the first touch pages and fill caches
                times[name].append(took)
    found = {f"{name}_ms": median(each) for name, each in times.items()}
    worst = sorted(times["index_and_read"])[int(0.95 * repeats)]
    ratio = found["slice_sampler_ms"] / found["index_and_read_ms"]
    return {"rows": store.num_rows, "repeats": repeats, **found, "index_and_read_p95_ms": worst, "ratio": ratio}


def growth(folder: Path, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Drawing from larger and larger stores."""
    found = []
    for episodes in sizes:
        store = sparse_store(folder / f"sparse_{episodes}", episodes)
        row: dict[str, Any] = {"rows": store.num_rows}
        for name, balanced in (("index", False), ("index_balanced", True)):
            made = time.perf_counter()
            index = SliceIndex(store, HORIZON, balanced=balanced)
            row[f"{name}_made_ms"] = 1e3 * (time.perf_counter() - made)
            index.sample(SLICES)
            row[f"{name}_ms"] = median(milliseconds(lambda index=index: index.sample(SLICES)) for _ in range(repeats))
        found.append(row)
    return found


def drop_pages(store: Path) -> None:
    """Ask the kernel to forget a store's pages."""
    for name in (layout.OBSERVATION, layout.ACTION, layout.REWARD):
        descriptor = os.open(store / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_cold(path: Path, repeats: int, drop: bool) -> dict[str, Any]:
    """Batches from all over a store: in the cgroup, or with its pages dropped before each."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"cold": [], "cold_prefetched": []}
    drop_pages(path)
    store = EpisodeStore.open(path)
    index = SliceIndex(store, HORIZON)
    for repeat in range(2 * repeats):
        if drop:
            # A page that is mapped is not dropped: the mapping has to go first.
            del store
            drop_pages(path)
            store = EpisodeStore.open(path)
        ahead = repeat % 2 == 1
        took = milliseconds(lambda store=store, ahead=ahead: read_batch(store, index, ahead))
        times["cold_prefetched" if ahead else "cold"].append(took)
    found = {f"{name}_ms": median(each) for name, each in times.items()}
    return found | {f"{name}_p95_ms": sorted(each)[int(0.95 * repeats)] for name, each in times.items()}


def read_batch(store: EpisodeStore, index: SliceIndex, ahead: bool) -> TensorDict:
    """Draw and read one batch."""
    rows = index.sample(SLICES)
    if ahead:
        store.prefetch(rows, HORIZON)
    return store.slices(rows, HORIZON)


def cold(folder: Path, episodes: int, limit: int, repeats: int) -> dict[str, Any]:
    """Run :func:`read_cold` in a cgroup; where none can be made, without, dropping pages."""
    store = real_store(folder / "cold", episodes)
    found: dict[str, Any] = {"store_bytes": store.num_rows * ROW_BYTES, "limit_bytes": limit, "repeats": repeats}
    path, member = store.path, [sys.executable, __file__, "--member", str(store.path), str(repeats)]
    del store
    try:
        with limited_group(limit) as group:
            join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
            done = subprocess.run([*join, *member], capture_output=True, text=True, check=True)
    except OSError as error:
        return {**found, "without_cgroup": str(error), **read_cold(path, repeats, drop=True)}
    return {**found, **json.loads(done.stdout.splitlines()[-1])}


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    first, last, cold_found = found["warm"], found["growth"], found["cold"]
    how = f"page cache limited to {cold_found['limit_bytes'] / MIB:.0f} MiB by a memory cgroup"
    if "without_cgroup" in cold_found:
        how = "all its pages dropped with posix_fadvise before each batch"
    rows = {
        f"warm, {first['rows']:,} rows: draw and read, ms": f"{first['index_and_read_ms']:.1f} "
        f"(95th percentile {first['index_and_read_p95_ms']:.1f})",
        "drawing alone, ms": f"{first['index_ms']:.2f} (balanced over tasks: {first['index_balanced_ms']:.2f})",
        "TorchRL `SliceSampler(cache_values=True)`, in memory, the same data, ms": f"{first['slice_sampler_ms']:.1f}",
        "TorchRL / ours": f"{first['ratio']:.1f}",
    }
    for row in last:
        rows[f"drawing at {row['rows']:,} rows, ms"] = (
            f"{row['index_ms']:.2f} (balanced: {row['index_balanced_ms']:.2f}); built once in "
            f"{row['index_made_ms']:.0f} ms"
        )
    rows[f"cold, {cold_found['store_bytes'] / MIB:.0f} MiB, {how}: draw and read, ms"] = (
        f"{cold_found['cold_ms']:.0f} (95th percentile {cold_found['cold_p95_ms']:.0f})"
    )
    rows["the same with `prefetch`, ms"] = (
        f"{cold_found['cold_prefetched_ms']:.0f} (95th percentile {cold_found['cold_prefetched_p95_ms']:.0f})"
    )
    lines = [
        "# Sampling from an episode store",
        "",
        f"`python benchmarks/data_sampling.py`, {found['date']}, {found['hardware']}.",
        f"{SLICES} slices of {HORIZON} transitions ({HORIZON + 1} observations), {TASKS.observation_dim} wide "
        f"observations and {TASKS.action_dim} wide actions, one thread, file system {found['filesystem']}; medians of "
        f"{first['repeats']}. On a machine shared with other work.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "The larger stores, in which only drawing is measured, are sparse files with MT30's table of episodes.",
    ]
    if "without_cgroup" in cold_found:
        lines.append(f"No memory cgroup could be made here: {cold_found['without_cgroup']}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller stores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for the files (default: a temporary one)")
    parser.add_argument("--member", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()
    if args.member:
        print(json.dumps(read_cold(Path(args.member[0]), int(args.member[1]), drop=False)))
        return 0
    quiet_torchrl()
    torch.set_num_threads(1)
    limit = 512 * MIB if args.quick else 2048 * MIB
    repeats = 20 if args.quick else 100
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        found = {
            "warm": warm(folder, 1000 if args.quick else 4000, repeats),
            "growth": growth(folder, [4000, MT30_EPISODES] if args.quick else [4000, 100_000, MT30_EPISODES], repeats),
            "cold": cold(folder, 4 * limit // (ROW_BYTES * (LENGTH + 1)) // 1000 * 1000, limit, repeats),
            "filesystem": filesystem_type(folder) or "unknown",
            "date": date.today().isoformat(),
            "hardware": hardware(),
        }
    print(table(found))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    if args.publish:
        results = ROOT / "benchmarks" / "results"
        (results / "data_sampling.json").write_text(text, encoding="utf-8")
        (results / "data_sampling.md").write_text(table(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
