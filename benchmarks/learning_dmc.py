"""Online learning on seven DMControl tasks with one configuration, beside published numbers.

    python benchmarks/learning.py --suite dmc                     # what is missing of 7 tasks x 3 seeds, to 200k steps
    python benchmarks/learning.py --suite dmc --steps 100000      # to the first reading only
    python benchmarks/learning.py --suite dmc --tasks cheetah-run --seeds 1
    python benchmarks/learning.py --suite dmc --table             # run nothing, rewrite the table

Only ``env.task`` and the seed differ between runs; words after ``--`` are settings for all of them, and runs with other
settings have a section of their own. A reading is the deterministic return of the policy at that step, over 20 episodes
from starts that no earlier evaluation had. Every run is a directory below ``runs/learning/dmc``; finished ones are kept
and unfinished ones resumed. One seed of every task comes before the second of any, and each finished run adds its
readings to ``learning_dmc.csv`` there, or in ``benchmarks/results`` with ``--publish``.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from math import isfinite
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from pwm_torchrl.report.statistics import estimate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "learning" / "dmc"
CSV = "learning_dmc.csv"
COLUMNS = ("task", "seed", "env_steps", "return", "return_std", "minutes", "finished", "overrides")

#: Environment steps per epoch: 8 environments x 16 agent steps x action repeat 2.
EPOCH = 256
#: Epochs between evaluations; both readings are whole multiples.
EVAL_EVERY = 23
#: The first evaluation after so many environment steps is the reading; 391 and 782 epochs.
READINGS = (100_000, 200_000)

#: Published means over seeds: TD-MPC2, SAC and DreamerV3 at 100k and 200k environment steps, from the result files that
#: TD-MPC2's authors publish for all three (state observations, action repeat 2).
ANCHORS: dict[str, dict[str, tuple[int, int]]] = {
    "cartpole-swingup": {"TD-MPC2": (839, 872), "SAC": (835, 842), "DreamerV3": (677, 796)},
    "pendulum-swingup": {"TD-MPC2": (724, 824), "SAC": (96, 268), "DreamerV3": (699, 733)},
    "reacher-easy": {"TD-MPC2": (937, 976), "SAC": (540, 715), "DreamerV3": (872, 844)},
    "cup-catch": {"TD-MPC2": (981, 977), "SAC": (958, 968), "DreamerV3": (870, 866)},
    "finger-spin": {"TD-MPC2": (948, 974), "SAC": (762, 807), "DreamerV3": (328, 509)},
    "cheetah-run": {"TD-MPC2": (519, 614), "SAC": (310, 574), "DreamerV3": (336, 353)},
    "walker-walk": {"TD-MPC2": (962, 973), "SAC": (708, 923), "DreamerV3": (630, 802)},
}
TASKS = tuple(ANCHORS)


@dataclass(frozen=True)
class Reading:
    """One line of the CSV."""

    task: str
    seed: int
    env_steps: int
    value: float
    std: float
    minutes: float
    finished: str
    overrides: str

    def row(self) -> list[str]:
        """Its cells."""
        numbers = (f"{self.value:.1f}", f"{self.std:.1f}", f"{self.minutes:.1f}")
        return [self.task, str(self.seed), str(self.env_steps), *numbers, self.finished, self.overrides]


def recorded(folder: Path) -> list[Reading]:
    """The lines of a folder's CSV."""
    if not (folder / CSV).exists():
        return []
    with (folder / CSV).open(encoding="utf-8", newline="") as file:
        return [
            Reading(
                r["task"],
                int(r["seed"]),
                int(r["env_steps"]),
                float(r["return"]),
                float(r["return_std"]),
                float(r["minutes"]),
                r["finished"],
                r["overrides"],
            )
            for r in csv.DictReader(file)
        ]


def record(readings: list[Reading], folder: Path) -> None:
    """Add lines to a folder's CSV."""
    new = not (folder / CSV).exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CSV).open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(reading.row() for reading in readings)


def readings_of(run_dir: Path, task: str, seed: int, overrides: str) -> list[Reading]:
    """What a run's metrics have at the readings that it has reached."""
    found = []
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return_mean")]
    for wanted in READINGS:
        row = next((row for row in rows if float(row["env_steps"]) >= wanted), None)
        if row is not None and float(row["env_steps"]) < wanted + EVAL_EVERY * EPOCH:
            minutes = float(row["wall_clock_s"]) / 60
            value, std = float(row["eval/return_mean"]), float(row["eval/return_std"])
            found.append(Reading(task, seed, wanted, value, std, minutes, date.today().isoformat(), overrides))
    return found


def words(task: str, seed: int, steps: int) -> list[str]:
    """The settings of one run."""
    return [
        "model=residual",
        "env=task",
        f"env.task={task}",
        f"seed={seed}",
        f"training.steps={steps}",
        f"training.eval_every={EVAL_EVERY}",
        "training.eval_episodes=20",
        "training.checkpoint_every=100",
        "training.gradient_profile_every=0",
        "training.video=false",
        "training.progress=false",
        "training.threads=1",
    ]


def command(task: str, seed: int, steps: int, run_dir: Path, extra: list[str]) -> list[str]:
    """The command of one run."""
    script = str(ROOT / "launch" / "train.py")
    return [sys.executable, script, *words(task, seed, steps), f"run_dir={run_dir}", *extra]


def run_missing(tasks: list[str], seeds: int, steps: int, extra: list[str], folder: Path) -> None:
    """Run what the CSV in ``folder`` lacks, one after the other; a failing run does not stop the others."""
    overrides = " ".join(extra)
    due = [reading for reading in READINGS if reading <= steps]
    for seed in range(seeds):
        for task in tasks:
            have = {r.env_steps for r in recorded(folder) if (r.task, r.seed, r.overrides) == (task, seed, overrides)}
            missing = [reading for reading in due if reading not in have]
            if not missing:
                continue
            name = task if not extra else f"{task}_" + "_".join(extra).replace("/", "-")
            run_dir = RUNS / f"{name}_{steps}" / f"seed{seed}"
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            print(f"{time.strftime('%H:%M:%S')}  {task} seed {seed}", flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            with (run_dir.parent / f"seed{seed}.log").open("a", encoding="utf-8") as log:
                done = subprocess.run(
                    command(task, seed, steps, run_dir, extra), cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            if done.returncode or not (run_dir / "metrics.csv").exists():
                print(f"  failed, see {log.name}", flush=True)
                continue
            found = [r for r in readings_of(run_dir, task, seed, overrides) if r.env_steps in missing]
            record(found, folder)
            for reading in found:
                print(f"  {reading.env_steps}: {reading.value:.0f} after {reading.minutes:.0f} minutes", flush=True)


def document(hardware: str, folder: Path) -> str:
    """The results in a folder as Markdown, those with other settings below."""
    lines = [
        "# DMControl online, one configuration",
        "",
        f"`python benchmarks/learning.py --suite dmc`, {hardware}; one thread per run. Deterministic return of the "
        "policy at that step, 20 episodes from fresh starts, mean over seeds; published means beside it (TD-MPC2's "
        "result files). Bold: at least 95 % of SAC's. Minutes until the reading, on a machine shared with other work.",
        "",
        *table("", folder),
    ]
    for overrides in sorted({r.overrides for r in recorded(folder)} - {""}):
        lines += table(overrides, folder)
    return "\n".join(lines)


def table(overrides: str, folder: Path) -> list[str]:
    """The lines of the tables of one configuration."""
    mine = [r for r in recorded(folder) if r.overrides == overrides]
    lines = []
    for k, steps in enumerate(READINGS):
        here = {t: [r for r in mine if (r.task, r.env_steps) == (t, steps)] for t in TASKS}
        if not any(here.values()):
            continue
        partial = " (partial)" if min(len(found) for found in here.values()) < 3 else ""
        settings = f" with `{overrides}`" if overrides else ""
        lines += [
            f"## {steps:,} environment steps{settings}{partial}",
            "",
            "| task | seeds | return | SAC | TD-MPC2 | DreamerV3 | of SAC | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for task, found in here.items():
            published = [ANCHORS[task][name][k] for name in ("SAC", "TD-MPC2", "DreamerV3")]
            others = " | ".join(map(str, published))
            if not found:
                lines.append(f"| {task} | 0 | | {others} | | |")
                continue
            values = [r.value for r in found]
            mean, share = float(np.mean(values)), float(np.mean(values)) / published[0]
            shown = f"{mean:.0f}" + (f" ({', '.join(f'{v:.0f}' for v in values)})" if len(values) > 1 else "")
            shown = f"**{shown}**" if share >= 0.95 else shown
            minutes = float(np.mean([r.minutes for r in found]))
            lines.append(f"| {task} | {len(found)} | {shown} | {others} | {share:.0%} | {minutes:.0f} |")
        done = [[r.value for r in found] for found in here.values() if found]
        if len(done) < 2:
            lines.append("")
            continue
        if len({len(values) for values in done}) > 1:
            lines += ["", "No mean over tasks: they do not have the same number of seeds.", ""]
            continue
        pooled = estimate(*done)
        assert pooled is not None
        # A task with one seed shows no spread: drawn anew, it is always the same.
        interval = f" (95 % bootstrap interval {pooled.low:.0f} to {pooled.high:.0f})" if isfinite(pooled.low) else ""
        runs = f"{pooled.count} runs of {len(done)} tasks"
        lines += ["", f"Interquartile mean over {runs}: {pooled.value:.0f}{interval}.", ""]
    return lines


def main(words: list[str], hardware: str) -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=READINGS[-1], help="environment steps (default 200000)")
    parser.add_argument("--table", action="store_true", help="run nothing, rewrite the table")
    parser.add_argument("--publish", action="store_true", help="continue table and CSV in benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="more settings for every run, like algorithm.horizon=0")
    args = parser.parse_args(words)
    out = RESULTS if args.publish else RUNS
    if not args.table:
        run_missing(args.tasks, args.seeds, args.steps, args.overrides, out)
    text = document(hardware, out)
    print("\n" + text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "learning_dmc.md").write_text(text, encoding="utf-8")
