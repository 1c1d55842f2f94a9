"""From data to a policy per task: one world model pre-trained on several tasks, then a policy for each of them in it.

    python benchmarks/multitask.py --demo                # two tasks, flow_v2: what `make multitask-demo` runs
    python benchmarks/multitask.py                       # four tasks; mlp, residual and flow_v2
    python benchmarks/multitask.py --table               # only rewrite the table from what has run

Stages, each of which is skipped where its result is there, and resumed where it was interrupted: a short online run
per task, whose partly trained policy acts in a third of the data's episodes, random actions in the others, drawn anew
every step or held for up to 40; the data, in TD-MPC2's format; the import into a store; a world model per kind of
dynamics; a policy per task and kind. Final policies play fresh episodes; the lower end of a 95 % bootstrap interval of
their mean return is compared with the mean return of the data and of a random policy. Everything lies below
``runs/multitask``; table and picture go beside them, with ``--publish`` to
``benchmarks/results``, and a table with missing runs says so.
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

from pwm_torchrl.report.statistics import bootstrap_interval  # noqa: E402
from pwm_torchrl.run.directory import read_summary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DEMO_TASKS = ("pendulum-swingup", "cartpole-swingup")
TASKS = (*DEMO_TASKS, "cup-catch", "reacher-easy")
MODELS = ("mlp", "residual", "flow_v2")
EVALUATION_EPISODES = 20
RANDOM_SEED, EVALUATION_SEED = 77_000_000, 88_000_000

BEHAVIOUR = (
    *("model=mlp", "env.num_envs=8", "training.epochs=120", "training.eval_every=60"),
    "algorithm.first_model_updates=100",
)
PRETRAIN = (
    # The sparse reward of pendulum-swingup is learned last: from many short slices sooner than from few long ones, and
    # with TD-MPC2's coefficients latents hardly tell where it pays.
    *("size=tiny", "model.loss.reward_coef=2.0", "algorithm.horizon=4", "algorithm.model_batch=256"),
    *("algorithm.model_updates=50", "training.epochs=120"),
    *("training.eval_every=10", "training.checkpoint_every=10", "data.balanced=true"),
    *("data.validation_fraction=0.05", "data.validation_slices=128"),
)
EXTRACT = (
    # A single critic: the smallest of several lowers the value at every bootstrap by what they disagree, and where
    # rewards are rare nothing outweighs that. As many steps as the world models foresee rewards. And a little entropy:
    # a policy that has learned from spinning data to push one way for ever is saturated, and gets no gradient any more.
    *("size.num_critics=1", "algorithm.horizon=8", "algorithm.entropy_weight=0.01", "algorithm.gamma=0.98"),
    *("algorithm.actor_batch=64", "algorithm.actor_lr=1e-3", "algorithm.critic_lr=1e-3"),
    *("training.epochs=400", "training.eval_every=50", "training.checkpoint_every=50", "training.eval_episodes=10"),
    "training.video=false",
)
EPISODES = 60
#: Beside the partly trained policies. White noise hardly moves a pendulum: a world model of such data knows little of
#: what lies between hanging and spinning, and policies learn what is true in it alone.
BEHAVIOURS = ("--policy=random", "--policy=random:40")
QUICK = {
    "behaviour": ("training.epochs=2", "algorithm.first_model_updates=4", "training.eval_episodes=1"),
    "pretrain": ("training.epochs=2", "algorithm.model_updates=2", "training.eval_every=2"),
    "extract": ("training.epochs=2", "training.eval_every=2", "training.eval_episodes=1"),
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
        quick (bool): a few updates each, to check the command.
        jobs (int): runs at a time.
    """

    def __init__(self, folder: Path, tasks: tuple[str, ...], models: tuple[str, ...], quick: bool, jobs: int) -> None:
        self.folder, self.tasks, self.models, self.quick, self.jobs = folder, tasks, models, quick, jobs
        self.chunks, self.store = folder / "chunks", folder / "store"
        self.set = ",".join(tasks)
        self.episodes = 4 if quick else EPISODES

    def extra(self, stage: str) -> tuple[str, ...]:
        return QUICK[stage] if self.quick else ()

    def behaviours(self) -> list[Job]:
        jobs = []
        for task in self.tasks:
            env = (f"env.task={task}", f"env.name={task}", "env._target_=pwm_torchrl.envs.make_task_env")
            words = (*env, *BEHAVIOUR, "training.video=false", *self.extra("behaviour"))
            jobs.append(Job(f"behaviour {task}", self.folder / "behaviour" / task, "train.py", words))
        return jobs

    def pretraining(self) -> list[Job]:
        return [
            Job(
                f"world model {model}",
                self.folder / "pretrain" / model,
                "pretrain.py",
                (f"model={model}", f"tasks={self.set}", f"data.path={self.store}", *PRETRAIN, *self.extra("pretrain")),
            )
            for model in self.models
        ]

    def extraction(self) -> list[Job]:
        return [
            Job(
                f"policy {model} {task}",
                self.folder / "extract" / model / task,
                "train.py",
                (
                    *("experiment=extract", f"task={task}", f"world_model={self.folder / 'pretrain' / model}"),
                    *(f"data.path={self.store}", *EXTRACT, *self.extra("extract")),
                ),
            )
            for model in self.models
            for task in self.tasks
        ]

    def run(self) -> None:
        """Whatever is missing, stage by stage."""
        run_all(self.behaviours(), self.jobs)
        policies = [f"--policy={job.run_dir.name}={job.run_dir}" for job in self.behaviours()]
        data = [sys.executable, str(ROOT / "launch" / "data.py")]
        if not self.store.is_dir():
            words = ["--tasks", self.set, "--episodes", str(self.episodes), *BEHAVIOURS, *policies]
            tell("data")
            check([*data, "generate", *words, "--out", str(self.chunks)])
        check([*data, "import", str(self.chunks), str(self.store), "--tasks", self.set])
        run_all(self.pretraining(), self.jobs)
        run_all(self.extraction(), self.jobs)

    def rows(self) -> list[dict[str, Any]]:
        """A row per task and kind: returns of data, random policy and extracted policy."""
        from pwm_torchrl.data.episodes import EpisodeStore

        store = EpisodeStore.open(self.store)
        rows = []
        for task in self.tasks:
            number = store.task_names.index(task)
            data = store.returns(np.flatnonzero(store.task == number))
            random = cached(self.folder / f"random_{task}.json", lambda task=task: random_returns(task))
            for model in self.models:
                run = self.folder / "extract" / model / task
                row = {"task": task, "model": model, "data": float(data.mean()), "data_max": float(data.max())}
                row |= {"random": float(np.mean(random))}
                if read_summary(run).get("status") == "finished":
                    returns = cached(run / "final_returns.json", lambda run=run: final_returns(run))
                    low, high = bootstrap_interval([returns], np.mean)
                    row |= {"mean": float(np.mean(returns)), "low": float(low), "high": float(high)}
                    row |= {"better": bool(low > row["data"] and low > row["random"])}
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


def random_returns(task: str) -> list[float]:
    """Of uniform actions, as many episodes as policies play."""
    from pwm_torchrl.envs import make_task_env
    from pwm_torchrl.run.evaluation import play, random_action

    env = make_task_env(task, num_envs=EVALUATION_EPISODES, seed=RANDOM_SEED)
    returns = play(env, random_action(env), RANDOM_SEED).returns.tolist()
    env.close()
    return returns


def final_returns(run: Path) -> list[float]:
    """Of a run's newest policy, in episodes that neither training nor the choice of a checkpoint has seen."""
    from pwm_torchrl.run.load import evaluate_run

    return list(evaluate_run(run, EVALUATION_EPISODES, EVALUATION_SEED, which="latest")["returns"])


def markdown(command: str, rows: list[dict[str, Any]], title: str) -> str:
    """The table, with its provenance; marked partial while runs are missing."""
    partial = any("mean" not in row for row in rows)
    lines = [
        f"# {title}{' (partial)' if partial else ''}",
        "",
        f"`{command}`, {date.today().isoformat()}, {hardware()}. One seed.",
        f"Deterministic returns of the last policy in {EVALUATION_EPISODES} fresh episodes: mean and 95 % bootstrap "
        f"interval. The data are {EPISODES} episodes per task, in thirds: random actions, random actions that are held "
        "for up to 40 steps, and a partly trained policy with noise. The random policy draws its actions every step.",
        "",
        "| task | dynamics | extracted policy | mean of the data | best of the data | random policy | above both |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean = f"{row['mean']:.0f} [{row['low']:.0f}, {row['high']:.0f}]" if "mean" in row else "not run"
        above = {None: "", True: "yes", False: "no"}[row.get("better")]
        lines.append(
            f"| {row['task']} | {row['model']} | {mean} | {row['data']:.0f} | {row['data_max']:.0f} | "
            f"{row['random']:.0f} | {above} |"
        )
    return "\n".join(lines) + "\n"


def plot(study: Study, rows: list[dict[str, Any]], out: Path) -> None:
    """Returns in the environment while policies are extracted, one panel per task."""
    from matplotlib.figure import Figure

    from pwm_torchrl.run.metrics import read_metrics

    figure = Figure(figsize=(3.6 * len(study.tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(study.tasks), squeeze=False)[0], study.tasks, strict=True):
        for i, model in enumerate(study.models):
            file = study.folder / "extract" / model / task / "metrics.csv"
            if not file.exists():
                continue
            columns = read_metrics(file)
            epoch, value = (np.array(columns.get(key, [])) for key in ("epoch", "eval/return_mean"))
            if len(value):
                axes.plot(epoch[~np.isnan(value)], value[~np.isnan(value)], marker=".", color=f"C{i}", label=model)
        row = next(row for row in rows if row["task"] == task)
        axes.axhline(row["data"], color="0.5", linestyle=":", linewidth=1, label="mean of the data")
        axes.axhline(row["random"], color="0.7", linestyle="--", linewidth=1, label="random policy")
        axes.set(title=task, xlabel="epochs of extraction")
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("return in the environment")
    first.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="two tasks and flow_v2, in less than 20 minutes on 2 cores")
    parser.add_argument("--tasks", nargs="+", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}")
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
    models = tuple(args.models or (("flow_v2",) if args.demo else MODELS))
    folder = args.out or ROOT / "runs" / (f"{name}_quick" if args.quick else name)
    study = Study(folder.absolute(), tasks, models, args.quick, args.jobs)
    started = time.monotonic()
    if not args.table:
        study.run()
    rows = study.rows()
    words = [word for word in sys.argv[1:] if word not in ("--table", "--quick", "--publish")]
    text = markdown(" ".join(["python benchmarks/multitask.py", *words]), rows, f"{len(tasks)} tasks, one world model")
    print(f"\n{text}\n{(time.monotonic() - started) / 60:.1f} minutes; runs, curves and logs: {folder}")
    out = RESULTS if args.publish else folder
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    plot(study, rows, out / f"{name}.png")
    if args.json:
        args.json.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
