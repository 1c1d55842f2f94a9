"""Scores of policies extracted for the tasks of a set, and their means, as multi-task results are published."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pwm_torchrl.envs.tasks import PUBLISHED_SETS
from pwm_torchrl.report.collect import RunReport, last
from pwm_torchrl.report.statistics import bootstrap_interval
from pwm_torchrl.report.tables import Table, number_text

__all__ = ["SCORE_TEXT", "score_table"]

SCORE_TEXT = (
    "Normalised scores of extracted policies, 0 to 100: return / 10 of DMControl's tasks, percent of successful "
    "episodes of Meta-World's; mean ± standard deviation over seeds of the last evaluation. Set means are over tasks, "
    "with a 95 % bootstrap interval over seeds within each task, or, where a task has a single seed, over tasks. A set "
    "of which not all tasks have a score is marked partial."
)

_SCALE = 100.0


def score_table(runs: Sequence[RunReport]) -> Table | None:
    """A row per task and one per set of tasks, a column per model and size; ``None`` without extracted policies."""
    scores: dict[str, dict[str, list[float]]] = {}
    returns: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.config is None or run.config.mode != "extract":
            continue
        values = [value for value in run.metrics.get("eval/score", []) if math.isfinite(value)]
        score = last(values)
        arm, task = f"{run.model} {run.size}", str(run.config.task)
        kept = scores.setdefault(arm, {}).setdefault(task, [])
        told = returns.setdefault(arm, {}).setdefault(task, [])
        if score is not None:
            kept.append(_SCALE * score)
            if run.final_return is not None:
                told.append(run.final_return)
    if not scores:
        return None
    arms = sorted(scores)
    found = {task for by_task in scores.values() for task in by_task}
    tasks = _ordered(found)
    rows = [[task, *(_cell(scores[arm].get(task, []), returns[arm].get(task, [])) for arm in arms)] for task in tasks]
    for name, members in _sets(found).items():
        rows.append([name, *(_mean(members, scores[arm]) for arm in arms)])
    return Table(["task", *arms], rows)


def _ordered(found: set[str]) -> list[str]:
    published = [task for task in PUBLISHED_SETS["mt80"] if task in found]
    return [*published, *sorted(found - set(published))]


def _sets(found: set[str]) -> dict[str, list[str]]:
    """The published sets that the runs have reached into for more than half of their tasks, and all tasks there are."""
    sets = {
        f"mean of {name}": list(tasks)
        for name, tasks in PUBLISHED_SETS.items()
        if 2 * len(found.intersection(tasks)) > len(tasks)
    }
    own = f"mean of {len(found)} task{'s' if len(found) > 1 else ''}"
    return {**sets, **({} if any(set(tasks) == found for tasks in sets.values()) else {own: _ordered(found)})}


def _cell(scores: Sequence[float], returns: Sequence[float]) -> str:
    if not scores:
        return "-"
    spread = f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
    raw = f" (return {number_text(float(np.mean(returns)))})" if returns else ""
    return f"{np.mean(scores):.1f}{spread}{raw}"


def _mean(tasks: Sequence[str], scores: dict[str, list[float]]) -> str:
    strata = [scores[task] for task in tasks if scores.get(task)]
    if not strata:
        return "-"
    means = [float(np.mean(stratum)) for stratum in strata]
    partial = f" (partial: {len(strata)} of {len(tasks)})" if len(strata) < len(tasks) else ""
    if min(map(len, strata)) > 1:
        # A task counts once, however many seeds it has: equal weights by drawing task means.
        low, high = _within(strata)
    elif len(means) > 1:
        low, high = (float(x) for x in bootstrap_interval([means], np.mean))
    else:
        return f"{means[0]:.1f}{partial}"
    return f"{np.mean(means):.1f} [{low:.1f}, {high:.1f}]{partial}"


def _within(strata: Sequence[Sequence[float]], resamples: int = 2000) -> tuple[float, float]:
    """Interval of the mean over tasks of means over seeds, seeds drawn within each task."""
    generator = np.random.default_rng(0)
    total = np.zeros(resamples)
    for stratum in strata:
        values = np.asarray(stratum)
        total += values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(total / len(strata), [2.5, 97.5])
    return float(low), float(high)
