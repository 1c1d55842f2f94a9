"""Memory while TD-MPC2's chunks are imported: sampled beside the import, against 1.2 times the chunk plus 500 MB.

    python benchmarks/data_import.py              # chunks of 100 and 300 MB
    python benchmarks/data_import.py --quick      # smaller; writes no table

Each chunk is written on the spot and imported by a process of its own, whose resident memory (``VmRSS``, mapped pages
of the chunk included) and anonymous memory (``RssAnon``) are read twenty times a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from pwm_torchrl.data.episodes import EpisodeStore, import_chunks  # noqa: E402
from pwm_torchrl.envs.tasks import task_set  # noqa: E402

TASKS = task_set("mt30")
LENGTH = 501
MB = 10**6
INTERVAL_S = 0.05


def write_chunk(folder: Path, size: int) -> Path:
    """A chunk of about ``size`` bytes in TD-MPC2's format, of the widest tasks."""
    episodes = size // (LENGTH * 4 * (TASKS.observation_dim + TASKS.action_dim + 2))
    chunk = TensorDict(
        obs=torch.randn(episodes, LENGTH, TASKS.observation_dim),
        action=torch.rand(episodes, LENGTH, TASKS.action_dim) * 2 - 1,
        reward=torch.rand(episodes, LENGTH),
        task=torch.arange(episodes, dtype=torch.int32).remainder(3).unsqueeze(1).repeat(1, LENGTH),
        batch_size=[episodes, LENGTH],
    )
    chunk["action"][:, 0] = float("nan")
    chunk["reward"][:, 0] = float("nan")
    folder.mkdir(parents=True)
    torch.save(chunk, folder / "chunk_0.pt")
    return folder / "chunk_0.pt"


def importing(source: Path, store: Path, ready: Any, go: Any) -> None:
    """The process that is watched."""
    torch.set_num_threads(1)
    ready.set()
    go.wait()
    import_chunks(source, store, TASKS)


def memory(pid: int) -> tuple[int, int] | None:
    """(VmRSS, RssAnon) in bytes; ``None`` once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.split() for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    if len(fields) < 2:
        return None
    return int(fields["VmRSS"][1]) * 1024, int(fields["RssAnon"][1]) * 1024


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Import a chunk and log its memory."""
    writer = multiprocessing.get_context("spawn").Process(target=write_chunk, args=(folder / "chunks", size))
    writer.start()
    writer.join()
    chunk = folder / "chunks" / "chunk_0.pt"
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=importing, args=(folder / "chunks", folder / "store", ready, go))
    process.start()
    assert process.pid is not None
    ready.wait()
    before = memory(process.pid)
    assert before is not None
    go.set()
    started, log = time.perf_counter(), []
    while process.is_alive():
        now = memory(process.pid)
        if now is not None:
            log.append((time.perf_counter() - started, now[0] - before[0], now[1] - before[1]))
        time.sleep(INTERVAL_S)
    process.join()
    if process.exitcode:
        sys.exit(f"the import ended with exit code {process.exitcode}")
    seconds = time.perf_counter() - started
    bytes_ = chunk.stat().st_size
    return {
        "chunk_bytes": bytes_,
        "allowed_bytes": int(1.2 * bytes_ + 500 * MB),
        "rss_growth_bytes": max(rss for _, rss, _ in log),
        "anonymous_growth_bytes": max(anonymous for _, _, anonymous in log),
        "seconds": seconds,
        "transitions": EpisodeStore.open(folder / "store").num_transitions,
        "log": [log[round(i * (len(log) - 1) / 9)] for i in range(10)],
    }


def table(found: dict[str, Any], quick: bool) -> str:
    """The result for people."""
    lines = [
        "# Importing TD-MPC2's chunks",
        "",
        f"`python benchmarks/data_import.py{' --quick' if quick else ''}`, {found['date']}, {found['hardware']}.",
        "Growth of a process's memory while it imports one chunk; resident memory counts pages of the chunk that are "
        "mapped, which the kernel takes back when others need them.",
        "",
        "| chunk, MB | transitions | seconds | resident, peak growth, MB | anonymous, MB | allowed, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        names = ("rss_growth_bytes", "anonymous_growth_bytes", "allowed_bytes")
        cells = " | ".join(f"{row[name] / MB:.0f}" for name in names)
        lines.append(f"| {row['chunk_bytes'] / MB:.0f} | {row['transitions']:,} | {row['seconds']:.1f} | {cells} |")
    lines += ["", "The largest one's log:", "", "| second | resident, MB | anonymous, MB |", "|---|---|---|"]
    lines += [f"| {s:.2f} | {rss / MB:.0f} | {anon / MB:.0f} |" for s, rss, anon in found["rows"][-1]["log"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller chunks; writes no table")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    sizes = (20 * MB, 60 * MB) if args.quick else (100 * MB, 300 * MB)
    with tempfile.TemporaryDirectory() as name:
        rows = [measure(size, Path(name) / str(size)) for size in sizes]
    found = {"rows": rows, "date": date.today().isoformat(), "hardware": hardware()}
    print(table(found, args.quick))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    if not args.quick:
        results = ROOT / "benchmarks" / "results"
        (results / "data_import.json").write_text(text, encoding="utf-8")
        (results / "data_import.md").write_text(table(found, args.quick), encoding="utf-8")


if __name__ == "__main__":
    main()
