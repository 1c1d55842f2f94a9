"""Results by task: scores of extracted policies, as multi-task results are published, and held-out errors of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from pwm_torchrl.envs.tasks import PUBLISHED_SETS
from pwm_torchrl.report.collect import RunReport, last
from pwm_torchrl.report.statistics import bootstrap_interval, mean_of_means
from pwm_torchrl.report.tables import Table, number_text

__all__ = ["HELD_OUT_TEXT", "SCORE_TEXT", "held_out_table", "score_table"]

SCORE_TEXT = (
    "Normalised scores of extracted policies, 0 to 100: return / 10 of DMControl tasks, percent of successful episodes "
    "of Meta-World tasks; mean ± population standard deviation over seeds of the last evaluation. Means of a set are "
    "over its tasks, with a 95 % bootstrap interval over the seeds of each task, or over tasks where a task has a "
    "single seed. A set in which not all tasks have a score is marked partial."
)

HELD_OUT_TEXT = (
    "Errors of pre-trained world models on episodes that were not trained on, rolled out without feedback over the "
    "horizon: mean squared error of latents, and squared error of rewards over the variance of rewards; mean ± "
    "population standard deviation over seeds, at the epoch with the lowest validation loss, whose weights are kept."
)

_SCALE = 100.0
_ALL = "mean"  # over tasks
_ERRORS = {"validation/latent_mse": "latent MSE", "validation/reward_nmse": "reward NMSE"}


def score_table(runs: Sequence[RunReport]) -> Table | None:
    """A row per task and one per set of tasks, a column per model and size; ``None`` without extracted policies."""
    scores = _scores(runs)
    if scores.empty:
        return None
    arms = sorted(scores["arm"].unique())
    tasks = _ordered(set(scores["task"]))
    cells = scores.groupby(["task", "arm"]).apply(_cell).unstack(fill_value="-")
    rows = [[task, *(cells.loc[task, arm] for arm in arms)] for task in tasks]
    by_task = {
        arm: dict(list(part.dropna(subset="score").groupby("task")["score"])) for arm, part in scores.groupby("arm")
    }
    for name, members in _sets(set(tasks)).items():
        rows.append([name, *(_mean(members, by_task[arm]) for arm in arms)])
    return Table(["task", *arms], rows)


def _scores(runs: Sequence[RunReport]) -> pd.DataFrame:
    """A row per extracted policy: ``arm`` (model and size), ``task``, ``score`` in percent and ``final`` return."""
    rows = []
    for run in runs:
        if run.config is not None and run.config.mode == "extract":
            score = last(run.metrics.get("eval/score", []))
            scaled = math.nan if score is None else _SCALE * score
            final = math.nan if score is None or run.final_return is None else run.final_return
            rows.append((f"{run.model} {run.size}", str(run.config.task), scaled, final))
    return pd.DataFrame(rows, columns=["arm", "task", "score", "final"])


def _cell(policies: pd.DataFrame) -> str:
    """One task's policies of one model and size."""
    scores = policies["score"].dropna()
    if scores.empty:
        return "-"
    spread = f" ± {scores.std(ddof=0):.1f}" if len(scores) > 1 else ""
    final = policies["final"].mean()
    raw = "" if math.isnan(final) else f" (return {number_text(float(final))})"
    return f"{scores.mean():.1f}{spread}{raw}"


def _ordered(found: set[str]) -> list[str]:
    published = [task for task in PUBLISHED_SETS["mt80"] if task in found]
    return [*published, *sorted(found - set(published))]


def _sets(found: set[str]) -> dict[str, list[str]]:
    """Published sets of which more than half of the tasks are here, and the set of all tasks that are here."""
    sets = {
        f"mean of {name}": list(tasks)
        for name, tasks in PUBLISHED_SETS.items()
        if 2 * len(found.intersection(tasks)) > len(tasks)
    }
    own = f"mean of {len(found)} task{'s' if len(found) > 1 else ''}"
    return {**sets, **({} if any(set(tasks) == found for tasks in sets.values()) else {own: _ordered(found)})}


def _mean(tasks: Sequence[str], scores: dict[str, pd.Series]) -> str:
    strata = [scores[task].to_numpy() for task in tasks if task in scores]
    if not strata:
        return "-"
    mean = float(mean_of_means(*strata))
    partial = f" (partial: {len(strata)} of {len(tasks)})" if len(strata) < len(tasks) else ""
    if min(map(len, strata)) > 1:
        low, high = bootstrap_interval(strata, mean_of_means)
    elif len(strata) > 1:
        low, high = bootstrap_interval([[stratum.mean() for stratum in strata]], mean_of_means)
    else:
        return f"{mean:.1f}{partial}"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]{partial}"


def held_out_table(runs: Sequence[RunReport]) -> Table | None:
    """A row per task, and one for their mean, with two errors for each model and size; ``None`` without validations."""
    errors = _held_out(runs)
    if errors.empty:
        return None
    grouped = errors.groupby(["task", "arm", "error"])["value"]
    cells = grouped.agg(lambda v: f"{v.mean():.3g}" + (f" ± {v.std(ddof=0):.2g}" if len(v) > 1 else ""))
    arms = sorted(errors["arm"].unique())
    tasks = [_ALL, *_ordered(set(errors["task"]) - {_ALL})]
    columns = [(arm, error) for arm in arms for error in _ERRORS.values()]
    rows = [[task, *(cells.get((task, arm, error), "-") for arm, error in columns)] for task in tasks]
    return Table(["task", *(f"{arm}: {error}" for arm, error in columns)], rows)


def _held_out(runs: Sequence[RunReport]) -> pd.DataFrame:
    """A row per run, task and error: columns ``arm``, ``task``, ``error`` and ``value``."""
    rows = []
    for run in runs:
        if last(run.metrics.get("validation/loss", [])) is None:
            continue
        metrics = pd.DataFrame(run.metrics)
        best = metrics.loc[metrics["validation/loss"].idxmin()]
        for column, value in best.items():
            for prefix, error in _ERRORS.items():
                if str(column).startswith(prefix) and math.isfinite(value):
                    task = str(column).removeprefix(prefix).removeprefix("/") or _ALL
                    rows.append((f"{run.model} {run.size}", task, error, value))
    return pd.DataFrame(rows, columns=["arm", "task", "error", "value"])
