"""Does flow help? Latent dynamics at equal parameters on the same fixed data, paired by seed.

    python benchmarks/flow_study.py                      # what is missing of 2 tasks x 5 seeds x 11 kinds
    python benchmarks/flow_study.py --seeds 1 --kinds residual flow_v2
    python benchmarks/flow_study.py --publish            # continue CSV, table and figure in benchmarks/results
    python benchmarks/flow_study.py --publish --table    # run nothing, rewrite table and figure

Written down before the runs:

**Outcome.** Open-loop reward error: squared error over the variance of the held-out rewards, mean over the steps 1
to 16 of rollouts without feedback, on held-out episodes, after 1000 updates. The rollout is that of imagination, so
``few_step`` is measured by its map of one evaluation.

**Comparison.** Each kind against ``residual``, which is the flow's parameterisation in one step: log of the ratio of
the two errors of the same task and seed, mean over the tasks, one number per seed. Reported are the mean over seeds as
a change in percent and its 95 % interval of Student's t. The primary comparison is ``flow_v2``, the package's default;
all others are described, without a correction for their number.

**Smallest effect of interest.** 10 % less error. "Helps": the mean is at least that and the interval is below 0.
"Does not help": the interval excludes a gain of 10 %. Else undecided. A gain is one of *flow* only if ``flow_v2`` is
also better than both controls below, which have its depth and no flow time.

**Kinds.** ``mlp`` (as ``algorithm=pwm`` trains it, in slices of five steps with one-step terms, the best form measured
so far), ``residual``, the flows V1, V2 and V3 with the default loss and (``_fm``) with flow matching in it,
weighted like the rollout's latent error, ``few_step``, and two controls: ``iterated`` is V2's network and solver
without flow time, ``untied`` has a network of its own for each of four residual steps. Nothing is tuned for any kind;
the number of updates was chosen for the time that it takes, after a look at ``residual`` with a seed outside the study.

**Data.** For each task and seed 24 episodes to train on and 12 held out, from other starts. Half of the episodes have
uniform actions, half correlated ones. All kinds of a task and seed have the same data, first weights of encoder and
reward head, and batches in the same order.

**Changed after the first seed.** Flow matching had weight 1, beside the 20 of the rollout's latent error, and changed
errors by at most 0.2 %; the six fits were discarded for ones with weight 20. Nothing else was changed.

Secondary: the reward error of one step, latent errors over the latents' variance (the latents are each model's own),
CPU time per update and per imagined step, and the reward error at half of the updates.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

import torch  # noqa: E402
from scipy import stats  # noqa: E402
from tensordict import TensorDict, TensorDictBase  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.learning import hardware  # noqa: E402
from benchmarks.model_quality import errors_over_variances, windows  # noqa: E402
from pwm_torchrl.algorithm.build import (  # noqa: E402
    EnvFacts,
    Facts,
    Networks,
    build_model_loss,
    build_optimizers,
    build_world_model,
)
from pwm_torchrl.cli.compose import compose  # noqa: E402
from pwm_torchrl.config import Config  # noqa: E402
from pwm_torchrl.envs import env_info  # noqa: E402
from pwm_torchrl.envs.factory import opened_env  # noqa: E402
from pwm_torchrl.modules import WorldModel, count_parameters  # noqa: E402
from pwm_torchrl.modules.dynamics import Dynamics, MLPDynamics, residual_endpoint  # noqa: E402
from pwm_torchrl.modules.dynamics.factory import matched_units  # noqa: E402
from pwm_torchrl.modules.dynamics.fused import Schedule, fused_transition  # noqa: E402
from pwm_torchrl.modules.layers import cat_features, normed_mlp  # noqa: E402
from pwm_torchrl.run.evaluation import Episodes, play  # noqa: E402
from pwm_torchrl.run.quality import latent_variance  # noqa: E402
from pwm_torchrl.run.train import quiet_torchrl  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "flow_study"

TASKS = ("cheetah-run", "cartpole-swingup")
HORIZON = 16
#: Change of the error against ``residual`` that counts.
SMALLEST = -0.10
EPISODES, HELD_OUT = 24, 12

#: As much as ``algorithm=pwm`` gives the rollout's latent error.
_MATCHING = "model.loss.flow_matching_weight=20"
#: The settings of each kind.
KINDS = {
    "mlp": ["model=mlp"],
    "residual": ["model=residual"],
    "flow_v1": ["model=flow_v1"],
    "flow_v2": ["model=flow_v2"],
    "flow_v3": ["model=flow_v3"],
    "flow_v1_fm": ["model=flow_v1", _MATCHING],
    "flow_v2_fm": ["model=flow_v2", _MATCHING],
    "flow_v3_fm": ["model=flow_v3", _MATCHING],
    "few_step": ["model=few_step"],
    "iterated": ["model=residual", "model.dynamics.kind=benchmarks.flow_study.Iterated"],
    "untied": ["model=residual", "model.dynamics.kind=benchmarks.flow_study.Untied"],
}


# Controls: the depth of a flow without its time -----------------------------------------------------------------------


class Iterated(Dynamics):
    """V2's network and solver, but the network is not told τ: the same function in each of seven evaluations."""

    schedule = Schedule("heun", 4)
    evaluations = schedule.evaluations

    def __init__(self, latent_dim: int, action_dim: int, task_dim: int, units: Sequence[int], simnorm_dim: int) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        budget = count_parameters(MLPDynamics(latent_dim, action_dim, task_dim, units, simnorm_dim))
        features = latent_dim + task_dim + action_dim
        self.net = normed_mlp(features, matched_units(units, features, latent_dim, budget), latent_dim, head=None)

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        context = cat_features(latent[..., :0], task_embedding, action)
        rows = latent.reshape(-1, latent.shape[-1]), context.reshape(-1, context.shape[-1])
        times = latent.new_empty(self.evaluations, 0)
        return fused_transition(*rows, times, self.net, self.simnorm_dim, self.schedule).view(latent.shape)


class Untied(Dynamics):
    """A deeper residual network: four steps of the residual parameterisation, each with a network of its own."""

    evaluations = 4

    def __init__(self, latent_dim: int, action_dim: int, task_dim: int, units: Sequence[int], simnorm_dim: int) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        budget = count_parameters(MLPDynamics(latent_dim, action_dim, task_dim, units, simnorm_dim))
        features = latent_dim + task_dim + action_dim
        widths = matched_units(units, features, latent_dim, budget // self.evaluations)
        self.nets = torch.nn.ModuleList(
            normed_mlp(features, widths, latent_dim, head=None) for _ in range(self.evaluations)
        )

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        for net in self.nets:
            latent = residual_endpoint(latent, net(cat_features(latent, task_embedding, action)), self.simnorm_dim)
        return latent


# Data -----------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What all kinds of a task and seed share."""

    train: TensorDictBase  # [N, T], one episode each
    held_out: Episodes
    facts: EnvFacts


class MixedActions:
    """Uniform actions in every other environment, correlated ones (first order, 0.9 per step) in the others.

    Their random numbers are their own: what a kind draws changes nothing here.
    """

    def __init__(self, action_dim: int, seed: int) -> None:
        self.action_dim = action_dim
        self.generator = torch.Generator().manual_seed(seed)
        self.state: Tensor | None = None

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = (*tensordict.batch_size, self.action_dim)
        noise = torch.randn(shape, generator=self.generator)
        self.state = noise if self.state is None else 0.9 * self.state + (1 - 0.9**2) ** 0.5 * noise
        action = self.state.clamp(-1, 1)
        action[::2] = torch.rand(action[::2].shape, generator=self.generator) * 2 - 1
        return tensordict.set("action", action)


def make_data(task: str, seed: int, episodes: int = EPISODES, held_out: int = HELD_OUT) -> Data:
    """Episodes of a task and seed; no start is in both parts."""
    env_cfg = compose(["env=task", f"env.task={task}"]).env

    def episodes_from(count: int, env_seed: int) -> tuple[Episodes, EnvFacts]:
        with opened_env(env_cfg, num_envs=count, seed=env_seed) as env:
            info = env_info(env)
            return play(env, MixedActions(info.action_dim, env_seed), env_seed), info

    first = 10_000 * (seed + 1)
    train, info = episodes_from(episodes, first)
    held, _ = episodes_from(held_out, first + 5000)
    assert bool(train.valid.all()), f"{task} ends episodes early, which these slices do not support"
    done = torch.zeros_like(train.valid)
    done[-1] = True
    following = {"observation": train.next_observation, "reward": train.reward, "done": done, "terminated": train.ends}
    data = TensorDict(
        observation=train.observation,
        action=train.action,
        next=TensorDict(following, train.valid.shape[:2]),
        batch_size=train.valid.shape[:2],
    )
    facts = Facts(info.observation_dim, info.action_dim, info.terminates)
    return Data(data.transpose(0, 1).contiguous(), held, facts)


class Batches:
    """Slices in an order that depends on nothing but the seed."""

    def __init__(self, data: TensorDictBase, count: int, length: int, seed: int) -> None:
        self.data, self.count, self.length = data, count, length
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> TensorDictBase:
        """The next ``[count, length]``."""
        episodes, steps = self.data.batch_size
        episode = torch.randint(episodes, (self.count, 1), generator=self.generator)
        start = torch.randint(steps - self.length + 1, (self.count, 1), generator=self.generator)
        return self.data[episode, start + torch.arange(self.length)]


# One fit --------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the CSV; errors are over variances."""

    task: str
    seed: int
    kind: str
    updates: int
    parameters: int  # of the dynamics
    reward_error: float  # the outcome
    reward_halfway: float  # the same at half of the updates
    reward_steps: str  # of the steps 1 to 16
    latent_steps: str
    ms_update: float  # CPU time
    ms_step: float  # of an imagined step of 128 latents, without gradient
    finished: str


def configuration(kind: str, task: str) -> Config:
    """What a run of this kind would train with."""
    return compose([*KINDS[kind], "env=task", f"env.task={task}"])


def build(kind: str, task: str, facts: EnvFacts, seed: int) -> tuple[Config, WorldModel]:
    """A model; encoder and reward head are made before the dynamics, so a seed gives all kinds the same ones."""
    cfg = configuration(kind, task)
    torch.manual_seed(seed)
    return cfg, build_world_model(cfg, facts)


def errors(model: WorldModel, held_out: Episodes) -> tuple[list[float], list[float]]:
    """Latent and reward errors of steps 1 to 16, over variances."""
    slices = windows(held_out, HORIZON)
    with torch.no_grad():
        variance = latent_variance(model.encode(slices.observation))
    latent, reward = errors_over_variances(model, slices, variance)
    return latent.tolist(), reward.tolist()


def milliseconds_per_step(model: WorldModel, facts: EnvFacts, repeats: int = 30) -> float:
    """CPU time of an imagined step of 128 latents, the median."""
    latent = model.encode(torch.zeros(128, facts.observation_dim))
    action, times = torch.zeros(128, facts.action_dim), []
    for _ in range(repeats):
        begun = time.process_time()
        model.predict(latent, action)
        times.append(time.process_time() - begun)
    return 1000 * float(np.median(times))


def fit(kind: str, task: str, seed: int, data: Data, updates: int) -> Row:
    """Train a model on the data, and measure it."""
    cfg, model = build(kind, task, data.facts, seed)
    if model.observation_statistics is not None:
        model.observation_statistics.update(data.train["observation"])
    if model.reward_deviation is not None:
        model.reward_deviation.update(data.train["next", "reward"])
    model.rescale()
    loss, optimizer = build_model_loss(cfg, model), build_optimizers(cfg, Networks(model=model))["model"]
    batches = Batches(data.train, cfg.algorithm.model_batch, cfg.algorithm.slice_length, seed)
    seconds, halfway = 0.0, float("nan")
    for update in range(1, updates + 1):
        batch = batches.draw()
        begun = time.process_time()
        torch.stack(list(loss(batch).values())).sum().backward()
        optimizer.step()
        seconds += time.process_time() - begun
        if update == updates // 2:
            halfway = float(np.mean(errors(model, data.held_out)[1]))
    latent, reward = errors(model, data.held_out)
    with torch.no_grad():
        ms_step = milliseconds_per_step(model, data.facts)
    return Row(
        task=task,
        seed=seed,
        kind=kind,
        updates=updates,
        parameters=count_parameters(model.dynamics),
        reward_error=round(float(np.mean(reward)), 6),
        reward_halfway=round(halfway, 6),
        reward_steps=" ".join(f"{e:.4g}" for e in reward),
        latent_steps=" ".join(f"{e:.4g}" for e in latent),
        ms_update=round(1000 * seconds / updates, 2),
        ms_step=round(ms_step, 3),
        finished=date.today().isoformat(),
    )


# Rows on disk ---------------------------------------------------------------------------------------------------------


def recorded(path: Path) -> list[Row]:
    """The lines of a CSV."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**{f.name: kinds[str(f.type)](r[f.name]) for f in fields(Row)}) for r in csv.DictReader(file)]


def record(row: Row, path: Path) -> None:
    """Add a line to a CSV."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow([f.name for f in fields(Row)])
        writer.writerow(astuple(row))


def run_missing(tasks: Sequence[str], seeds: int, kinds: Sequence[str], updates: int, path: Path) -> None:
    """Fit what the CSV lacks: one seed of all before the second of any."""
    for seed in range(seeds):
        for task in tasks:
            have = {r.kind for r in recorded(path) if (r.task, r.seed, r.updates) == (task, seed, updates)}
            missing = [kind for kind in kinds if kind not in have]
            data = make_data(task, seed) if missing else None
            for kind in missing:
                assert data is not None
                row = fit(kind, task, seed, data, updates)
                record(row, path)
                print(f"{time.strftime('%H:%M:%S')} {task} {seed} {kind} {row.reward_error:.4f}", flush=True)


# What the rows say ----------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """Relative change of the error against another kind: 0.1 is 10 % more."""

    by_seed: list[float]
    value: float
    low: float  # of the 95 % interval; NaN for a single seed
    high: float

    @property
    def verdict(self) -> str:
        """The reading that the page's docstring fixed beforehand."""
        if self.value <= SMALLEST and self.high < 0:
            return "helps"
        return "does not help" if self.low > SMALLEST else "undecided"


def change(rows: Sequence[Row], kind: str, against: str, tasks: Sequence[str]) -> Change | None:
    """Mean log ratio over tasks, for the seeds that have all of ``tasks`` for both kinds."""
    found = {(r.task, r.seed, r.kind): r.reward_error for r in rows}
    logs = []
    for seed in sorted({r.seed for r in rows}):
        pairs = [(found.get((task, seed, kind)), found.get((task, seed, against))) for task in tasks]
        ratios = [np.log(a / b) for a, b in pairs if a is not None and b is not None]
        if ratios and len(ratios) == len(tasks):
            logs.append(float(np.mean(ratios)))
    if not logs:
        return None
    mean, count = float(np.mean(logs)), len(logs)
    half = float("nan")
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(logs, ddof=1) / count**0.5)
    return Change([float(np.expm1(x)) for x in logs], *(float(np.expm1(x)) for x in (mean, mean - half, mean + half)))


def shown(found: Change | None) -> str:
    """A change as a cell."""
    return "" if found is None else f"{found.value:+.0%} ({found.low:+.0%} to {found.high:+.0%})"


def over_tasks(rows: Sequence[Row], kind: str, tasks: Sequence[str], number: str) -> str:
    """Means over seeds of a column, a number for each task."""
    cells = []
    for task in tasks:
        values = [getattr(r, number) for r in rows if (r.task, r.kind) == (task, kind)]
        if values and isinstance(values[0], str):
            steps = np.mean([[float(x) for x in v.split()] for v in values], 0)
            cells.append("/".join(f"{steps[step - 1]:.2g}" for step in (1, 4, HORIZON)))
        elif values:
            cells.append(f"{np.mean(values):.3f}")
    return " · ".join(cells)


def table(rows: list[Row], tasks: Sequence[str]) -> str:
    """The results as Markdown: the outcome and what it costs, then the secondary numbers."""
    kinds = [kind for kind in KINDS if any(r.kind == kind for r in rows)]
    counts = [min(len({r.seed for r in rows if (r.task, r.kind) == (task, kind)}) for kind in kinds) for task in tasks]
    seeds = " and ".join(f"{count} seeds of {task}" for count, task in zip(counts, tasks, strict=True))
    updates = "/".join(map(str, sorted({r.updates for r in rows})))
    lines = [
        "# Flow on fixed data",
        "",
        f"`python benchmarks/flow_study.py`, last fit {max(r.finished for r in rows)}, {hardware()}; one thread of a "
        f"machine shared with other work. {seeds}; {updates} updates of size `tiny` on {EPISODES} episodes of mixed "
        f"random actions, measured on {HELD_OUT} others. Errors are means over seeds, divided by the variance of the "
        f"data (1: as good as predicting the mean), {' · '.join(tasks)}; intervals are 95 %, over paired seeds. "
        "Milliseconds are CPU "
        "time, medians; an imagined step is one of 128 latents, without gradient.",
        "",
        "| kind | evaluations | parameters | reward error, mean of steps 1 to 16 | against residual | reading | "
        "ms per update | ms per imagined step |",
        "|---" * 8 + "|",
    ]
    for kind in kinds:
        mine = [r for r in rows if r.kind == kind]
        against = None if kind == "residual" else change(rows, kind, "residual", tasks)
        cells = [
            kind,
            str(evaluations(kind)),
            f"{mine[0].parameters:,}",
            over_tasks(rows, kind, tasks, "reward_error"),
            shown(against),
            "" if against is None else against.verdict,
            f"{np.median([r.ms_update for r in mine]):.0f}",
            f"{np.median([r.ms_step for r in mine]):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f'Secondary. Parameters are those of {tasks[0]}; "at half" is the outcome after half of the updates.',
        "",
        "| kind | against iterated | against untied | reward error at half | reward error, step 1/4/16 | "
        "latent error, step 1/4/16 |",
        "|---" * 6 + "|",
    ]
    for kind in kinds:
        controls = [None if kind == other else change(rows, kind, other, tasks) for other in ("iterated", "untied")]
        columns = ("reward_halfway", "reward_steps", "latent_steps")
        cells = [kind, *map(shown, controls), *(over_tasks(rows, kind, tasks, column) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evaluations(kind: str) -> int:
    """Evaluations of a network per imagined transition."""
    _, model = build(kind, TASKS[0], Facts(2, 1, False), 0)
    return model.dynamics.imagined_evaluations


def draw(rows: list[Row], tasks: Sequence[str], out: Path) -> None:
    """Changes against ``residual``: a panel for the tasks together, and one for each."""
    from pwm_torchrl.run.drawing import COLORS, new_figure, png, styled

    kinds = [kind for kind in KINDS if kind != "residual" and any(r.kind == kind for r in rows)]
    panels = {"all tasks": list(tasks), **{task: [task] for task in tasks}}
    found = {
        (title, kind): 100 * np.array([each.value, each.low, each.high, *each.by_seed])
        for title, group in panels.items()
        for kind in kinds
        if (each := change(rows, kind, "residual", group)) is not None
    }
    # The MLP is so far off that the others would be one point beside it; its value is written at the edge.
    drawn = np.concatenate([x for (_, kind), x in found.items() if kind != "mlp" or kinds == ["mlp"]])
    low, high = np.nanmin(drawn) - 3, np.nanmax(drawn) + 3
    with styled():
        figure = new_figure((9.0, 0.34 * len(kinds) + 1.3))
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, title in zip(axes, panels, strict=True):
            axis.axvline(0, color="#444444", linewidth=1)
            axis.axvline(100 * SMALLEST, color="#444444", linewidth=1, linestyle=":")
            for y, kind in enumerate(kinds):
                if (title, kind) not in found:
                    continue
                value, *interval = found[title, kind][:3]
                seeds = found[title, kind][3:]
                color = COLORS[1] if kind == "flow_v2" else COLORS[0] if kind.startswith(("flow", "few")) else "#666666"
                if interval[1] > high:
                    axis.text(high - 1, y, f"{value:+.0f} % \u2192", color=color, ha="right", va="center", fontsize=8)
                    continue
                axis.plot(seeds, [y + 0.25] * len(seeds), "o", color=color, alpha=0.4, markersize=3)
                axis.plot(interval, [y, y], color=color, linewidth=2)
                axis.plot(value, y, "o", color=color, markersize=6)
            axis.set_title(title)
            axis.set_yticks(range(len(kinds)), kinds)
        axes[0].set_xlim(low, high)
        axes[0].invert_yaxis()
        figure.supxlabel("change of the reward error against residual, % (dotted: the gain that counts)", fontsize=9)
        out.write_bytes(png(figure, dpi=150))


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), help=f"tasks of the registry (default {' '.join(TASKS)})"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--table", action="store_true", help="run nothing, rewrite table and figure")
    parser.add_argument("--publish", action="store_true", help="continue CSV, table and figure in benchmarks/results")
    args = parser.parse_args()
    quiet_torchrl()
    torch.set_num_threads(1)
    folder = RESULTS if args.publish else RUNS
    path = folder / "flow_study.csv"
    if not args.table:
        run_missing(args.tasks, args.seeds, args.kinds, args.updates, path)
    rows = [r for r in recorded(path) if r.task in args.tasks and r.updates == args.updates and r.kind in args.kinds]
    if not rows:
        sys.exit(f"{path} has no row of these tasks, kinds and updates")
    text = table(rows, args.tasks)
    print("\n" + text)
    (folder / "flow_study.md").write_text(text, encoding="utf-8")
    draw(rows, args.tasks, folder / "flow_study.png")


if __name__ == "__main__":
    main()
