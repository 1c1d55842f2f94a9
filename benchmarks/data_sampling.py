"""Sampling from a store of episodes: time to draw 1024 slices of 17 observations, whatever the size of the store.

    python benchmarks/data_sampling.py               # 4 million rows warm, 345 million sparse, 8 GiB cold in 1 GiB
    python benchmarks/data_sampling.py --quick       # smaller; writes no table
    python benchmarks/data_sampling.py --folder DIR  # where the files go; must be a disk

*Warm.* MT30's dimensions; indexing, and indexing with reading, from a store whose pages the kernel has cached; in turns
with TorchRL's ``SliceSampler(cache_values=True)`` over a ``LazyMemmapStorage`` of the same episodes. *Sparse.* Indexing
alone in a store of as many rows as MT30's published data, whose files have no content. *Cold.* A process in a memory
cgroup (version 1 or 2) draws from a store eight times larger than the group's limit, so that most rows are read from
the disk (a virtual one may have a cache of its own). Where no cgroup can be made, the reason is reported instead.
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
from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from benchmarks.replay_disk import MIB, limited_group  # noqa: E402
from pwm_torchrl.data.episodes import EpisodeRows, EpisodeStore, SliceIndex, StoreWriter  # noqa: E402
from pwm_torchrl.data.episodes import layout as store_layout  # noqa: E402
from pwm_torchrl.envs.tasks import task_set  # noqa: E402
from pwm_torchrl.training.run import quiet_torchrl  # noqa: E402

HORIZON, SLICES, LENGTH = 16, 1024, 500
TASKS = task_set("mt30")


def write_store(folder: Path, rows: int) -> EpisodeStore:
    """Random episodes of 500 transitions, which no file system can compress."""
    generator = np.random.default_rng(0)
    episodes = max(len(TASKS), rows // (LENGTH + 1))
    with StoreWriter(folder, TASKS) as writer:
        for begin in range(0, episodes, 1000):
            count = min(1000, episodes - begin)
            part = count * (LENGTH + 1)
            task = (begin + np.arange(count)) % len(TASKS)
            writer.append(
                EpisodeRows(
                    generator.standard_normal((part, TASKS.observation_dim), np.float32),
                    generator.uniform(-1, 1, (part, TASKS.action_dim)).astype(np.float32),
                    generator.random(part, np.float32),
                    np.full(count, LENGTH),
                    task,
                )
            )
        writer.commit([{"name": "random", "state": "imported"}])
        writer.finish()
    return EpisodeStore.open(folder)


def sparse_store(folder: Path, rows: int) -> EpisodeStore:
    """A store whose data files have a size and no content."""
    small = write_store(folder, 1)
    episodes = rows // (LENGTH + 1)
    number = np.arange(episodes)
    table = np.stack([number * (LENGTH + 1), np.full(episodes, LENGTH), number % len(TASKS)], axis=1)
    np.save(folder / store_layout.EPISODES, table)
    np.save(folder / store_layout.RETURNS, np.zeros(episodes))
    manifest = {**small.manifest, "episodes": episodes, "transitions": episodes * LENGTH}
    for name, size in store_layout.file_sizes(manifest).items():
        with (folder / name).open("r+b") as file:
            file.truncate(size)
    (folder / store_layout.MANIFEST).write_text(json.dumps(manifest))
    return EpisodeStore.open(folder)


def torchrl_buffer(store: EpisodeStore, folder: Path) -> TensorDictReplayBuffer:
    """The same episodes as TorchRL would hold them."""
    rows = store.num_rows
    episode = np.repeat(np.arange(store.num_episodes), store.length + 1)
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(rows, scratch_dir=folder),
        sampler=SliceSampler(slice_len=HORIZON + 1, traj_key="episode", cache_values=True),
        batch_size=SLICES * (HORIZON + 1),
    )
    step = 500_000
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        buffer.extend(
            TensorDict(
                observation=torch.from_numpy(store._observation[part].copy()),
                action=torch.from_numpy(store._action[part].copy()),
                reward=torch.from_numpy(store._reward[part].copy()),
                episode=torch.from_numpy(episode[part]),
                batch_size=[part.stop - part.start],
            )
        )
    return buffer


def timed(work: Any, repeats: int) -> dict[str, float]:
    """Milliseconds: median and quartiles."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    low, high = np.percentile(times, [25, 75])
    return {"median": median(times), "low": float(low), "high": float(high)}


def warm(rows: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Indexing, reading, and TorchRL's sampler."""
    store = write_store(folder / "store", rows)
    index = SliceIndex(store, HORIZON)
    for name in ("_observation", "_action", "_reward"):
        getattr(store, name).sum(dtype=np.float64)  # reads every page
    buffer = torchrl_buffer(store, folder / "torchrl")
    buffer.sample()  # its sampler looks the episodes up once

    def draw() -> None:
        store.slices(index.sample(SLICES), HORIZON)

    draw()
    found = {
        "rows": store.num_rows,
        "indexing": timed(lambda: index.sample(SLICES), repeats),
        "indexing_and_reading": timed(draw, repeats),
        "torchrl": timed(buffer.sample, max(5, repeats // 5)),
    }
    return {**found, "torchrl_ratio": found["torchrl"]["median"] / found["indexing_and_reading"]["median"]}


def sparse(rows: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Indexing in a store as large as MT30's data."""
    store = sparse_store(folder, rows)
    index = SliceIndex(store, HORIZON)
    return {"rows": store.num_rows, "indexing": timed(lambda: index.sample(SLICES), repeats)}


def cold(limit: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Draw in a process whose page cache is limited; what it found, or why it could not be run."""
    store = write_store(folder, 8 * limit // sum(store_layout.bytes_per_row(24, 6).values()))
    size = sum(store_layout.file_sizes(store.manifest).values())
    found: dict[str, Any] = {"rows": store.num_rows, "store_bytes": size, "limit_bytes": limit}
    del store
    subprocess.run(["sync"], check=False)
    for file in folder.iterdir():  # what writing left in the page cache belongs to this process's group
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with limited_group(limit) as group:
            member = [sys.executable, __file__, "--member", str(folder), str(repeats)]
            join = 'echo $$ > "$0" && exec "$@"'
            child = subprocess.run(
                ["sh", "-c", join, group / "cgroup.procs", *member], capture_output=True, text=True, check=False
            )
    except OSError as error:
        return {**found, "not_run": str(error)}
    if child.returncode:
        return {**found, "not_run": (child.stderr.strip().splitlines() or ["no message"])[-1]}
    return {**found, **json.loads(child.stdout.splitlines()[-1])}


def member(folder: Path, repeats: int) -> dict[str, Any]:
    """What the process in the cgroup does."""
    torch.set_num_threads(1)
    store = EpisodeStore.open(folder)
    index = SliceIndex(store, HORIZON)
    return {"indexing_and_reading": timed(lambda: store.slices(index.sample(SLICES), HORIZON), repeats)}


def table(found: dict[str, Any], quick: bool) -> str:
    """The result for people."""

    def ms(times: dict[str, float]) -> str:
        return f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"

    hot, empty, slow = found["warm"], found["sparse"], found["cold"]
    rows = {
        f"indexing, {hot['rows']:,} rows, ms": ms(hot["indexing"]),
        f"indexing, {empty['rows']:,} rows (sparse), ms": ms(empty["indexing"]),
        f"indexing and reading, {hot['rows']:,} rows, cached, ms": ms(hot["indexing_and_reading"]),
        "TorchRL's SliceSampler(cache_values=True), the same rows, ms": ms(hot["torchrl"]),
        "TorchRL / ours": f"{hot['torchrl_ratio']:.1f}",
    }
    sizes = f"{slow['store_bytes'] / MIB:.0f} MiB, at most {slow['limit_bytes'] / MIB:.0f} of them cached"
    told = f"not run: {slow['not_run']}" if "not_run" in slow else ms(slow["indexing_and_reading"])
    rows[f"indexing and reading, {sizes}, ms"] = told
    lines = [
        "# Sampling from stored episodes",
        "",
        f"`python benchmarks/data_sampling.py{' --quick' if quick else ''}`, {found['date']}, {found['hardware']}.",
        f"{SLICES} slices of {HORIZON + 1} observations, MT30's dimensions, one thread; median and quartiles. On a "
        "machine shared with other work: ratios say more than times.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller stores; writes no table")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--folder", type=Path, help="where the files go (a temporary folder)")
    parser.add_argument("--member", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.member:
        print(json.dumps(member(Path(args.member[0]), int(args.member[1]))))
        return
    quiet_torchrl()
    torch.set_num_threads(1)
    quick = args.quick
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        found: dict[str, Any] = {
            "sparse": sparse(10_000_000 if quick else 345_000_000, 20 if quick else 200, folder / "sparse"),
            "warm": warm(100_000 if quick else 4_000_000, 10 if quick else 100, folder / "warm"),
            "cold": cold(384 * MIB if quick else 1024 * MIB, 3 if quick else 30, folder / "cold"),
            "date": date.today().isoformat(),
            "hardware": hardware(),
        }
    print(table(found, quick))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    if not quick:
        results = ROOT / "benchmarks" / "results"
        (results / "data_sampling.json").write_text(text, encoding="utf-8")
        (results / "data_sampling.md").write_text(table(found, quick), encoding="utf-8")


if __name__ == "__main__":
    main()
