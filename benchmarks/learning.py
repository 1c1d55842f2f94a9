"""Learning table: models x environments x seeds, at one budget of environment steps per environment.

    python benchmarks/learning.py                        # Pendulum-v1, five models, three seeds
    python benchmarks/learning.py --suite cartpole       # dm_control cartpole-swingup, with TorchRL's SAC
    python benchmarks/learning.py --suite halfcheetah    # HalfCheetah-v5
    python benchmarks/learning.py --suite dmc            # seven DMControl tasks: learning_dmc.py has its options
    python benchmarks/learning.py --table                # only rewrite the table from what has run

Every run is a directory below ``runs/learning``; finished ones are kept and unfinished ones resumed, so the command can
be interrupted and repeated. The table and curves go beside the runs, with ``--publish`` to
``benchmarks/results``; a table with missing runs says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks import learning_dmc  # noqa: E402
from pwm_torchrl.cli.finalize import compose_and_finalize  # noqa: E402
from pwm_torchrl.run.directory import differing_keys, load_config  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PWM_MODELS = ("mlp", "residual", "flow_v1", "flow_v2", "flow_v3")


@dataclass(frozen=True)
class Suite:
    """What is compared on one environment; ``goal`` is the return aimed at."""

    title: str
    models: tuple[str, ...]
    seeds: int
    overrides: tuple[str, ...]
    goal: float
    quick: tuple[str, ...] = ("training.epochs=2", "algorithm.first_model_updates=4", "training.eval_every=1")


SUITES = {
    "pendulum": Suite("gymnasium Pendulum-v1", PWM_MODELS, 3, ("env=pendulum",), -200.0),
    "cartpole": Suite(
        "dm_control cartpole-swingup",
        ("mlp", "residual", "flow_v2", "sac"),
        1,
        ("env=cartpole_swingup",),
        700.0,
    ),
    "halfcheetah": Suite(
        "gymnasium HalfCheetah-v5",
        ("mlp", "residual", "flow_v2", "sac"),
        1,
        ("env=halfcheetah", "training.epochs=2000", "training.eval_every=50"),
        3000.0,
    ),
}


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    model: str
    seed: int
    run_dir: Path
    command: tuple[str, ...]
    settings: tuple[str, ...]

    def check(self) -> None:
        """Exit if the directory holds a run with other settings: its result has no place in this table."""
        if not (self.run_dir / "config.yaml").exists():
            return
        stored = load_config(self.run_dir)
        wanted = compose_and_finalize(self.settings)
        differing = differing_keys(replace(stored, model=wanted.model) if self.model == "sac" else stored, wanted)
        if differing:
            sys.exit(f"{self.run_dir} holds a run with different {', '.join(differing)}: move it to start this one")

    @property
    def summary(self) -> dict[str, Any]:
        """The run's result so far; empty before it has started."""
        file = self.run_dir / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"


def jobs(suite: Suite, folder: Path, models: list[str], seeds: list[int], extra: list[str]) -> Iterator[Job]:
    """The runs of a suite, seed by seed, so that an interrupted table covers every model."""
    for seed in seeds:
        for model in models:
            run_dir = folder / model / f"seed{seed}"
            words = [
                *suite.overrides,
                f"seed={seed}",
                f"run_dir={run_dir}",
                "training.video=false",
                "training.threads=1",
            ]
            script, choice = ("benchmarks/sac.py", []) if model == "sac" else ("launch/train.py", [f"model={model}"])
            settings = (*choice, *words, *extra)
            yield Job(model, seed, run_dir, (sys.executable, str(ROOT / script), *settings), settings)


def run_all(todo: list[Job], parallel: int) -> None:
    """Run the jobs, ``parallel`` at a time, one thread each; a failing one does not stop the others."""
    waiting, running = list(todo), {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            job.run_dir.parent.mkdir(parents=True, exist_ok=True)
            log = open(job.run_dir.parent / f"seed{job.seed}.log", "a", encoding="utf-8")  # noqa: SIM115 - closed below
            process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            running[process] = (job, log)
            print(f"{time.strftime('%H:%M:%S')}  started   {job.model} seed {job.seed}", flush=True)
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            job, log = running.pop(process)
            log.close()
            value = job.summary.get("final_return")
            state = "finished" if job.finished else f"failed, see {log.name}"
            print(f"{time.strftime('%H:%M:%S')}  {state}  {job.model} seed {job.seed}: {value}", flush=True)


def rows(suite: Suite, todo: list[Job]) -> list[dict[str, Any]]:
    """One table row per model, over its finished seeds."""
    table = []
    for model in dict.fromkeys(job.model for job in todo):
        mine = [job for job in todo if job.model == model]
        done = [job.summary for job in mine if job.finished]
        row: dict[str, Any] = {"model": model, "seeds_done": len(done), "seeds_planned": len(mine)}
        if done:
            final = np.array([s["final_return"] for s in done])
            peak = np.array([s["peak_return"] for s in done])
            row |= {
                "env_steps": done[0]["env_steps"],
                "final_mean": final.mean(),
                "final_std": final.std(),
                "finals": final.tolist(),
                "peak_mean": peak.mean(),
                "peak_std": peak.std(),
                "above_goal": int((final > suite.goal).sum()),
                "minutes": float(np.mean([s["wall_clock_s"] for s in done])) / 60,
                "random_return": done[0].get("random_return"),
            }
        table.append(row)
    return table


def hardware() -> str:
    """Machine and versions, one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchrl", "gymnasium"))
    cpus = f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
    return f"{cpus}, Python {platform.python_version()}, {versions}"


def markdown(command: str, suite: Suite, table: list[dict[str, Any]], finished: date) -> str:
    """The table as Markdown, with its provenance; marked partial while runs are missing."""
    partial = any(r["seeds_done"] < r["seeds_planned"] for r in table)
    random = next((r["random_return"] for r in table if r.get("random_return") is not None), None)
    lines = [
        f"# {suite.title}{' (partial)' if partial else ''}",
        "",
        f"`{command}`, last run finished {finished.isoformat()}, {hardware()}; one thread per run, "
        "on a machine shared with other work (minutes are only indicative).",
        f"Deterministic return of 10 episodes at the end of training; mean ± standard deviation over seeds. Goal "
        f"{suite.goal:g}" + (f", random policy {random:.0f}." if random is not None else "."),
        "",
        "| model | seeds | environment steps | final return | peak return | above goal | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table:
        seeds = f"{r['seeds_done']} of {r['seeds_planned']}"
        if not r["seeds_done"]:
            lines.append(f"| {r['model']} | {seeds} | | | | | |")
            continue
        lines.append(
            f"| {r['model']} | {seeds} | {r['env_steps']:,} | {over_seeds(r, 'final')} | {over_seeds(r, 'peak')} | "
            f"{r['above_goal']} of {r['seeds_done']} | {r['minutes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def over_seeds(row: dict[str, Any], which: str) -> str:
    """Mean of a return, and its deviation where there is more than one seed."""
    spread = f" ± {row[f'{which}_std']:.0f}" if row["seeds_done"] > 1 else ""
    return f"{row[f'{which}_mean']:.0f}{spread}"


def plot(suite: Suite, todo: list[Job], out: Path) -> None:
    """Mean evaluation return over environment steps with the spread over seeds, one line per model."""
    from matplotlib.figure import Figure

    from pwm_torchrl.run.metrics import read_metrics

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(dict.fromkeys(job.model for job in todo)):
        curves = []
        for job in todo:
            if job.model != model or not (job.run_dir / "metrics.csv").exists():
                continue
            columns = read_metrics(job.run_dir / "metrics.csv")
            steps, value = (np.array(columns.get(k, [])) for k in ("env_steps", "eval/return_mean"))
            if len(value):
                curves.append((steps[~np.isnan(value)], value[~np.isnan(value)]))
        if not curves:
            continue
        count = min(len(steps) for steps, _ in curves)
        steps = curves[0][0][:count]
        values = np.stack([value[:count] for _, value in curves])
        axes.plot(steps, values.mean(0), color=f"C{i}", label=f"{model} ({len(curves)})")
        axes.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
    axes.axhline(suite.goal, color="0.5", linestyle=":", linewidth=1)
    axes.set(xlabel="environment steps", ylabel="deterministic return", title=suite.title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="model (seeds)", frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Run what is missing, then write the table."""
    if sys.argv[1:3] == ["--suite", "dmc"]:
        learning_dmc.main(sys.argv[3:], hardware())
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="pendulum")
    parser.add_argument("--models", nargs="+", help="default: the suite's")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the suite's)")
    parser.add_argument("--name", help="folder and table of a variant (default: the suite's name)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--quick", action="store_true", help="two epochs per run: checks the command, measures nothing")
    parser.add_argument("--table", action="store_true", help="run nothing, rewrite the table")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("overrides", nargs="*", help="more settings for every run, like algorithm.gamma=0.98")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()

    suite = SUITES[args.suite]
    folder = ROOT / "runs" / ("learning_quick" if args.quick else "learning") / (args.name or args.suite)
    extra = [*(suite.quick if args.quick else ()), *args.overrides]
    models = args.models or list(suite.models)
    todo = list(jobs(suite, folder, models, list(range(args.seeds or suite.seeds)), extra))
    for job in todo:
        job.check()
    if not args.table:
        run_all([job for job in todo if not job.finished], args.jobs)
    table = rows(suite, todo)
    done = [(job.run_dir / "summary.json").stat().st_mtime for job in todo if job.finished]
    words = [word for word in sys.argv[1:] if word not in ("--table", "--quick", "--publish")]
    command = " ".join(["python benchmarks/learning.py", *words])
    text = markdown(command, suite, table, date.fromtimestamp(max(done, default=time.time())))
    print("\n" + text)
    out = RESULTS if args.publish else folder
    out.mkdir(parents=True, exist_ok=True)
    (out / f"learning_{args.name or args.suite}.md").write_text(text, encoding="utf-8")
    plot(suite, todo, out / f"learning_{args.name or args.suite}.png")
    if args.json:
        args.json.write_text(json.dumps({"suite": args.suite, "hardware": hardware(), "rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
