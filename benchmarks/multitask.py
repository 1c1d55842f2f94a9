"""From data to a policy per task: one world model pre-trained on several tasks, then a policy for each of them in it.

    python benchmarks/multitask.py --demo                # two tasks, residual: what `make multitask-demo` runs
    python benchmarks/multitask.py                       # five tasks; residual, mlp and flow_v2; three seeds
    python benchmarks/multitask.py --online RUN...       # with the replays of runs that are there already
    python benchmarks/multitask.py --table               # only rewrite the table from what has run

Stages, each skipped where its result is there and resumed where it was interrupted: an online run per task,
that of ``benchmarks/learning.py --suite dmc``; the import of their replays, from the first random actions to the last
policy; a world model per kind of dynamics; policies per task, kind and seed. The last policies play fresh episodes. A
policy is good if the lower end of a 95 % bootstrap interval of its mean return is above the mean return of the data,
and its mean above 80 % of that of the data's best tenth. Everything lies below ``runs/multitask``; table and picture go
beside them, with ``--publish`` to ``benchmarks/results``, and a table with missing runs says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from learning import hardware  # noqa: E402

from benchmarks import learning_dmc  # noqa: E402
from pwm_torchrl.report.statistics import bootstrap_interval  # noqa: E402
from pwm_torchrl.run.directory import load_config, read_summary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DEMO_TASKS = ("cartpole-swingup", "cup-catch")
TASKS = ("pendulum-swingup", "cartpole-swingup", "cup-catch", "reacher-easy", "finger-spin")
MODELS = ("residual", "mlp", "flow_v2")
STEPS, DEMO_STEPS = 100_000, 25_000
SEEDS = 3
EVALUATION_EPISODES = 20
EVALUATION_SEED = 88_000_000
#: A policy is compared with the best tenth of its task's data, and a task counts where that returns so much.
BEST, ENOUGH = 0.1, 500

PRETRAIN = (
    *("size=tiny", "training.epochs=200", "data.balanced=true"),
    *("data.validation_fraction=0.05", "data.validation_slices=128"),
)
EXTRACT = ("training.checkpoint_every=100", "training.video=false")
QUICK = {
    "online": ("training.steps=9000", "algorithm.updates_per_step=0.01", "training.eval_episodes=1"),
    "pretrain": ("training.epochs=2", "algorithm.model_updates=2", "training.eval_every=2"),
    "extract": ("training.epochs=2", "algorithm.actor_updates=2", "training.eval_every=2", "training.eval_episodes=1"),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run below the folder; finished when its summary says so."""

    name: str
    run_dir: Path
    script: str
    words: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return read_summary(self.run_dir).get("status") == "finished"

    @property
    def command(self) -> list[str]:
        """With one thread: networks this small gain nothing from two, which lose much beside other work."""
        words = [*self.words, f"run_dir={self.run_dir}", "training.threads=1", "device=cpu"]
        return [sys.executable, str(ROOT / "launch" / self.script), *words]


class Study:
    """The stages over some tasks and kinds of dynamics.

    Args:
        folder (Path): everything lies below it.
        tasks (sequence of str): the tasks.
        models (sequence of str): kinds of dynamics.
        steps (int): environment steps of the online runs.
        seeds (int): policies per task and kind.
        online (sequence of Path): online runs that are there already.
        quick (bool): a few updates each, to check the command.
        jobs (int): runs at a time.
    """

    def __init__(
        self,
        folder: Path,
        tasks: tuple[str, ...],
        models: tuple[str, ...],
        steps: int,
        seeds: int,
        online: list[Path],
        quick: bool,
        jobs: int,
    ) -> None:
        self.folder, self.tasks, self.models, self.steps, self.seeds = folder, tasks, models, steps, seeds
        self.quick, self.jobs = quick, jobs
        self.store, self.set = folder / "store", ",".join(tasks)
        self.stored = (f"data.path={self.store}",)
        self.sources = {task: folder / "online" / task for task in tasks}
        self.sources |= {str(load_config(run).env["task"]): run.absolute() for run in online}

    def extra(self, stage: str) -> tuple[str, ...]:
        return QUICK[stage] if self.quick else ()

    def online(self) -> list[Job]:
        return [
            Job(
                f"online {task}",
                self.sources[task],
                "train.py",
                (*learning_dmc.words(task, 0, self.steps), *self.extra("online")),
            )
            for task in self.tasks
        ]

    def pretraining(self) -> list[Job]:
        return [
            Job(
                f"world model {model}",
                self.folder / "pretrain" / model,
                "pretrain.py",
                (f"model={model}", f"tasks={self.set}", *self.stored, *PRETRAIN, *self.extra("pretrain")),
            )
            for model in self.models
        ]

    def extraction(self) -> list[Job]:
        """One seed of everything before the second of anything."""
        return [
            Job(
                f"policy {model} {task} {seed}",
                self.policy(model, task, seed),
                "train.py",
                (
                    *("experiment=extract", f"task={task}", f"world_model={self.folder / 'pretrain' / model}"),
                    *(f"seed={seed}", *self.stored, *EXTRACT, *self.extra("extract")),
                ),
            )
            for seed in range(self.seeds)
            for model in self.models
            for task in self.tasks
        ]

    def policy(self, model: str, task: str, seed: int) -> Path:
        """Directory of the run that extracts it."""
        return self.folder / "extract" / model / task / f"seed{seed}"

    def run(self) -> None:
        """Whatever is missing, stage by stage."""
        run_all(self.online(), self.jobs)
        runs = [str(self.sources[task]) for task in self.tasks]
        data = [sys.executable, str(ROOT / "launch" / "data.py")]
        check([*data, "import", *runs, str(self.store), "--tasks", self.set])
        run_all(self.pretraining(), self.jobs)
        run_all(self.extraction(), self.jobs)

    def rows(self) -> list[dict[str, Any]]:
        """A row per task and kind: returns of the data and of the extracted policies."""
        from pwm_torchrl.data.episodes import EpisodeStore

        store = EpisodeStore.open(self.store)
        rows = []
        for task in self.tasks:
            returns = np.sort(store.returns(np.flatnonzero(store.task == store.task_names.index(task))))
            best = float(returns[-max(1, round(BEST * len(returns))) :].mean())
            for model in self.models:
                row = {"task": task, "model": model, "data": float(returns.mean()), "best": best}
                runs = [self.policy(model, task, seed) for seed in range(self.seeds)]
                done = [run for run in runs if read_summary(run).get("status") == "finished"]
                found = [cached(run / "final_returns.json", lambda run=run: final_returns(run)) for run in done]
                row["seeds"] = [float(np.mean(each)) for each in found]
                if found:
                    pooled = np.concatenate(found)
                    row["mean"] = float(pooled.mean())
                    row["low"], row["high"] = map(float, bootstrap_interval([pooled], np.mean))
                    row["above_data"] = row["low"] > row["data"]
                    row["near_best"] = row["mean"] > 0.8 * best
                rows.append(row)
        return rows


def run_all(jobs: list[Job], parallel: int) -> None:
    """Run what is not finished, ``parallel`` at a time; stops at the first that fails."""
    waiting = [job for job in jobs if not job.finished]
    running: dict[subprocess.Popen[bytes], tuple[Job, Path]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            job.run_dir.mkdir(parents=True, exist_ok=True)
            log = job.run_dir.with_name(f"{job.run_dir.name}.log")
            with log.open("ab") as file:
                process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            running[process] = (job, log)
            tell(f"started   {job.name}")
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            job, log = running.pop(process)
            if not job.finished:
                for other in running:
                    other.terminate()
                    other.wait()
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                sys.exit(f"{job.name} ended without finishing; the end of {log}:\n" + "\n".join(lines[-8:]))
            tell(f"finished  {job.name}")


def check(command: list[str]) -> None:
    """Run a command to its end; exits with its code if it fails."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(done.returncode)


def tell(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def cached(file: Path, compute: Any) -> list[float]:
    """What is in the file, or what is computed and put there."""
    if file.exists():
        return list(json.loads(file.read_text()))
    values = list(compute())
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(values))
    draft.replace(file)
    return values


def final_returns(run: Path) -> list[float]:
    """Of a run's newest policy, in episodes that neither training nor the choice of a checkpoint has seen."""
    from pwm_torchrl.run.load import evaluate_run

    return list(evaluate_run(run, EVALUATION_EPISODES, EVALUATION_SEED, which="latest")["returns"])


def markdown(command: str, rows: list[dict[str, Any]], title: str, steps: int, seeds: int) -> str:
    """The table, with its provenance; marked partial while runs are missing."""
    partial = any(len(row["seeds"]) < seeds for row in rows)
    lines = [
        f"# {title}{' (partial)' if partial else ''}",
        "",
        f"`{command}`, {date.today().isoformat()}, {hardware()}.",
        f"The data are the replays of one online run per task, of {steps:,} environment steps. Deterministic returns "
        f"of the last policies in {EVALUATION_EPISODES} fresh episodes each: mean over seeds and episodes, 95 % "
        "bootstrap interval, mean of each seed. A task counts if the best tenth of its data returns "
        f"{ENOUGH} or more.",
        "",
        "| task | dynamics | extracted policies | seeds | mean of the data | best tenth | above the mean | "
        "above 80 % of the best tenth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    answer = {None: "", True: "yes", False: "no"}
    for row in rows:
        mean = f"{row['mean']:.0f} [{row['low']:.0f}, {row['high']:.0f}]" if "mean" in row else "not run"
        near = answer[row.get("near_best")] if row["best"] >= ENOUGH else "does not count"
        lines.append(
            f"| {row['task']} | {row['model']} | {mean} | {', '.join(f'{each:.0f}' for each in row['seeds'])} | "
            f"{row['data']:.0f} | {row['best']:.0f} | {answer[row.get('above_data')]} | {near} |"
        )
    return "\n".join(lines) + "\n"


def plot(study: Study, rows: list[dict[str, Any]], out: Path) -> None:
    """Returns in the environment while policies are extracted, one panel per task."""
    from matplotlib.figure import Figure

    from pwm_torchrl.run.metrics import read_metrics

    figure = Figure(figsize=(3.6 * len(study.tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(study.tasks), squeeze=False)[0], study.tasks, strict=True):
        for i, model in enumerate(study.models):
            for seed in range(study.seeds):
                file = study.policy(model, task, seed) / "metrics.csv"
                if not file.exists():
                    continue
                columns = read_metrics(file)
                epoch, value = (np.array(columns.get(key, [])) for key in ("epoch", "eval/return_mean"))
                there = ~np.isnan(value)
                label = model if seed == 0 else None
                axes.plot(epoch[there], value[there], marker=".", markersize=3, color=f"C{i}", label=label)
        row = next(row for row in rows if row["task"] == task)
        axes.axhline(row["data"], color="0.5", linestyle=":", linewidth=1, label="mean of the data")
        axes.axhline(row["best"], color="0.5", linestyle="--", linewidth=1, label="best tenth of the data")
        axes.set(title=task, xlabel="epochs of extraction")
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("return in the environment")
    first.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="two tasks, one kind and seed: 20 minutes on 2 cores")
    parser.add_argument("--tasks", nargs="+", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, help=f"policies per task and kind (default {SEEDS})")
    parser.add_argument("--online", nargs="+", type=Path, default=[], metavar="RUN", help="finished runs of the tasks")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument(
        "--quick", action="store_true", help="a few updates per run: checks the command, measures nothing"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, rewrite the table")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: below runs/)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()

    name = "multitask_demo" if args.demo else "multitask"
    tasks = tuple(args.tasks or (DEMO_TASKS if args.demo else TASKS))
    models = tuple(args.models or (("residual",) if args.demo else MODELS))
    seeds, steps = args.seeds or (1 if args.demo else SEEDS), DEMO_STEPS if args.demo else STEPS
    folder = args.out or ROOT / "runs" / (f"{name}_quick" if args.quick else name)
    study = Study(folder.absolute(), tasks, models, steps, seeds, args.online, args.quick, args.jobs)
    started = time.monotonic()
    if not args.table:
        study.run()
    rows = study.rows()
    words = [word for word in sys.argv[1:] if word not in ("--table", "--quick", "--publish")]
    command = " ".join(["python benchmarks/multitask.py", *words])
    text = markdown(command, rows, f"{len(tasks)} tasks, one world model", steps, seeds)
    print(f"\n{text}\n{(time.monotonic() - started) / 60:.1f} minutes; runs, curves and logs: {folder}")
    out = RESULTS if args.publish else folder
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    plot(study, rows, out / f"{name}.png")
    if args.json:
        args.json.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
