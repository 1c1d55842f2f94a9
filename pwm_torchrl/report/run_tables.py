"""The report's tables: runs, groups of seeds, measured and planned memory, and results by task.

Runs that differ only in the seed form a group. Results by task are scores of extracted policies, in the form in which
multi-task results are published, and held-out errors of models.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from pwm_torchrl.envs.tasks import PUBLISHED_SETS
from pwm_torchrl.report.collect import RunReport, last, natural
from pwm_torchrl.report.statistics import bootstrap_interval, mean_of_means
from pwm_torchrl.report.tables import Table, bytes_text, duration, number_text
from pwm_torchrl.run.directory import differing_keys

__all__ = [
    "HELD_OUT_TEXT",
    "SCORE_TEXT",
    "Group",
    "frame_of",
    "group_runs",
    "group_table",
    "held_out_table",
    "memory_table",
    "run_table",
    "score_table",
]

# Groups of runs that differ in the seed only --------------------------------------------------------------------------


_NAMED = 3  # maximum number of settings in a label


@dataclass
class Group:
    """Runs with equal settings that differ only in the seed.

    Attributes:
        settings: settings that distinguish them from other runs of the same model, size and environment, such as
            ``"algorithm.horizon=8"``; empty if there are no others.
    """

    model: str | None
    size: str | None
    env: str | None
    settings: str
    runs: list[RunReport]

    @property
    def label(self) -> str:
        """Model, size and distinguishing settings, for a legend."""
        return " ".join(filter(None, [str(self.model), str(self.size), self.settings]))


def group_runs(runs: Sequence[RunReport]) -> list[Group]:
    """Groups in reading order: by environment, size, model and settings.

    Runs of the same model, size and environment that differ in a key that affects training
    (:func:`~pwm_torchrl.run.directory.differing_keys`) are not averaged: they are in separate groups.
    """
    named: dict[tuple[Any, ...], list[RunReport]] = {}
    for run in runs:
        named.setdefault((run.model, run.size, run.env), []).append(run)
    groups = []
    for (model, size, env), members in named.items():
        for settings, equal in _by_settings(members):
            groups.append(Group(model, size, env, settings, sorted(equal, key=lambda run: natural(run.seed))))
    return sorted(groups, key=lambda g: [natural(text) for text in (g.env, g.size, g.model, g.settings)])


def _by_settings(runs: Sequence[RunReport]) -> list[tuple[str, list[RunReport]]]:
    """Runs by equal settings, each with a label of the settings that distinguish them from the others."""
    readable = [run for run in runs if run.config is not None]
    changed: list[dict[str, Any]] = []
    for run in readable:
        assert readable[0].config is not None
        assert run.config is not None
        differing = differing_keys(readable[0].config, run.config)
        changed.append({key: pair for key, pair in differing.items() if key != "seed"})
    keys = {key: pair[0] for pairs in changed for key, pair in pairs.items()}  # with the first run's values
    found: dict[str, list[RunReport]] = {}
    for run, pairs in zip(readable, changed):
        words = [f"{key}={pairs[key][1] if key in pairs else first}" for key, first in sorted(keys.items())]
        found.setdefault("\n".join(words), []).append(run)
    labels = [_shortened(text.splitlines()) for text in found]
    # Groups whose short labels are equal get a number.
    labels = [f"{t} ({labels[: i + 1].count(t)})" if labels.count(t) > 1 else t for i, t in enumerate(labels)]
    result = list(zip(labels, found.values()))
    unreadable = [run for run in runs if run.config is None]
    return [*result, ("settings unknown", unreadable)] if unreadable else result


def _shortened(words: Sequence[str]) -> str:
    more = [f"{len(words) - _NAMED} more"] if len(words) > _NAMED else []
    return ", ".join([*words[:_NAMED], *more])


# Runs, groups of seeds, and memory against plan -----------------------------------------------------------------------


_NAMES = ("model", "size", "env")
_STATE = ("status", "restarts", "time", "host", "GPU")
_NUMBERS = {
    "peak": "peak_return",
    "final": "final_return",
    "random": "random_return",
    "epochs": "epochs_done",
    "time": "wall_clock_s",
    "host": "host_bytes",
    "GPU": "device_bytes",
}  # columns of a table, and the names of their attributes in a RunReport
_FILES = (
    ("configuration", "config.yaml"),
    ("curves", "curves.png"),
    ("video", "video.mp4"),
    ("metrics", "metrics.csv"),
    ("log", "log.txt"),
)  # files of a run that the page links to if they exist
_LABELS = ("name", *_NAMES, "status")


def frame_of(runs: Sequence[RunReport]) -> pd.DataFrame:
    """A data frame with one row per run; unknown numbers are NaN.

    Returns:
        Columns ``name``, ``model``, ``size``, ``env``, ``status``, ``seed``, ``peak``, ``final``, ``random``,
        ``epochs``, ``planned``, ``time`` (s), ``host``, ``GPU`` (bytes; 0 GPU memory is treated as unknown),
        ``host_planned`` and ``GPU_planned``.
    """
    labels = {column: [getattr(run, column) for run in runs] for column in _LABELS}
    known: dict[str, list[Any]] = {column: [getattr(run, key) for run in runs] for column, key in _NUMBERS.items()}
    known["seed"] = [run.seed for run in runs]
    known["planned"] = [run.epochs_planned for run in runs]
    known["host_planned"] = [run.host_planned for run in runs]
    known["GPU_planned"] = [run.device_planned for run in runs]
    frame = pd.DataFrame({**labels, **{name: pd.Series(values, dtype=float) for name, values in known.items()}})
    frame["GPU"] = frame["GPU"].where(frame["GPU"] > 0)
    return frame


def run_table(runs: Sequence[RunReport], out: Path | None = None) -> Table:
    """One row per run.

    Args:
        runs: the runs.
        out: folder of the page, to which its links are relative. Defaults to ``None``: no links.
    """
    rows = []
    for run in runs:
        rows.append([_text(value) for value in (run.model, run.size, run.env, run.seed)])
        rows[-1] += [number_text(value) for value in (run.peak_return, run.final_return, run.random_return)]
        rows[-1] += [f"{run.epochs_done}/{_text(run.epochs_planned)}", run.status, reasons_text(run.restarts)]
        rows[-1] += [duration(run.wall_clock_s), bytes_text(run.host_bytes), bytes_text(run.device_bytes or None)]
        rows[-1] += [run.name, run.last_error or ""]
    return Table(
        [*_NAMES, "seed", "peak", "final", "random", "epochs", *_STATE, "run", "last error"],
        rows,
        wide=frozenset({"last error"}),
        narrow=("run", "GPU", "host", "time", "restarts", "random", "peak"),
        below={"run": ""},
        links={} if out is None else {"files": [_links(run, out) for run in runs]},
        keys=_sort_keys(frame_of(runs), [run.restarts.total() for run in runs]),
    )


def _links(run: RunReport, out: Path) -> list[tuple[str, str]]:
    """Links of a run: its directory, its existing files, and its W&B page."""
    folder = quote(os.path.relpath(run.path.resolve(), out.resolve()))
    found = [(text, f"{folder}/{name}") for text, name in _FILES if (run.path / name).exists()]
    return [("directory", f"{folder}/"), *found, *([("W&B", run.wandb_url)] if run.wandb_url else [])]


def group_table(groups: Sequence[Group]) -> Table:
    """One row per group of seeds: means and population standard deviations over the seeds."""
    frame = pd.concat([frame_of(group.runs) for group in groups], keys=range(len(groups)), names=["group"])
    by_group = frame.groupby(level="group")
    mean, count = by_group[["peak", "final", "time"]].mean(), by_group[["peak", "final"]].count()
    spread = by_group[["peak", "final"]].std(ddof=0)
    least, most = by_group[["epochs", "planned"]].min(), by_group[["epochs", "planned", "host", "GPU"]].max()
    restarts = [sum((run.restarts for run in group.runs), Counter[str]()) for group in groups]
    rows = []
    for i, group in enumerate(groups):
        runs = group.runs
        statuses = Counter(run.status for run in runs)
        planned = f"{most['planned'][i]:.0f}" if least["planned"][i] == most["planned"][i] else "?"
        done = f"{least['epochs'][i]:.0f}"
        done += f"-{most['epochs'][i]:.0f}" if least["epochs"][i] < most["epochs"][i] else ""
        rows.append([_text(value) for value in (group.model, group.size, group.env)])
        rows[-1] += [seeds_text([run.seed for run in runs])]
        rows[-1] += [_mean_text(mean[c][i], spread[c][i], count[c][i], len(runs)) for c in ("peak", "final")]
        rows[-1] += [f"{done}/{planned}", ", ".join(f"{n} {status}" for status, n in statuses.most_common())]
        rows[-1] += [reasons_text(restarts[i]), duration(_known(mean["time"][i]))]
        rows[-1] += [bytes_text(_known(most[place][i])) for place in ("host", "GPU")]
    head = [*_NAMES, "seeds", "peak", "final", "epochs", *_STATE]
    if any(group.settings for group in groups):
        head.append("settings")
        for row, group in zip(rows, groups):
            row.append(group.settings)
    values = pd.concat([mean, most[["epochs", "host", "GPU"]]], axis=1)
    return Table(
        head,
        rows,
        narrow=("settings", "status", "GPU", "host", "time", "restarts", "peak", "epochs"),
        below={"settings": "", "status": ""},
        keys=_sort_keys(values, [each.total() for each in restarts]),
    )


def memory_table(runs: Sequence[RunReport]) -> Table:
    """Measured peaks and the plan's predictions, one row per run that has a plan."""
    frame = frame_of(runs)
    places = [place for place in ("host", "GPU") if (frame[f"{place}_planned"] > 0).any()]
    planned = frame[[f"{place}_planned" for place in places]].notna().any(axis=1)
    rows = []
    for _, run in frame[planned].iterrows():
        rows.append([run["name"]])
        for place in places:
            measured, predicted = _known(run[place]), _known(run[f"{place}_planned"])
            share = f"{measured / predicted:.0%}" if measured and predicted else "-"
            rows[-1] += [bytes_text(measured), bytes_text(predicted), share]
    head = [f"{place} {what}" for place in places for what in ("measured", "predicted", "share")]
    return Table(["run", *head], rows, narrow=("run",), below={"run": ""})


def _sort_keys(values: pd.DataFrame, restarts: Sequence[int]) -> dict[str, list[float | None]]:
    """Numeric sort keys of a table's columns, for the page."""
    keys = {name: [_known(value) for value in values[name]] for name in _NUMBERS if name in values}
    return {**keys, "restarts": [float(count) for count in restarts]}


def _mean_text(mean: float, spread: float, count: int, runs: int) -> str:
    if not count:
        return "-"
    text = f"{mean:.1f}" if count == 1 else f"{mean:.1f} ± {spread:.1f}"
    return text if count == runs else f"{text} ({count} of {runs})"


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def reasons_text(restarts: Counter[str]) -> str:
    """Number of restarts and their reasons: ``"3: 2 timeout, 1 memory"``; ``"0"`` without restarts."""
    names = {reason: reason.replace("start_up", "start-up").replace("_", " ") for reason in restarts}
    words = [f"{count} {names[reason]}" for reason, count in restarts.most_common()]
    if len(words) == 1:
        words = list(names.values())
    return f"{restarts.total()}: {', '.join(words)}" if words else "0"


def seeds_text(seeds: Sequence[int | None]) -> str:
    """Number of seeds and their values: ``"3: 0-2"``, ``"2: 0, 7"``."""
    known = sorted({seed for seed in seeds if seed is not None})
    parts: list[list[int]] = []
    for seed in known:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    words = [f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"{len(seeds)}: {', '.join(words)}" if words else str(len(seeds))


# Results by task: scores of extracted policies, and held-out errors of models -----------------------------------------


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
    """One row per task and per set of tasks, one column per model and size; ``None`` without extracted policies."""
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
    """One row per extracted policy: ``arm`` (model and size), ``task``, ``score`` in percent and ``final`` return."""
    rows = []
    for run in runs:
        if run.config is not None and run.config.mode == "extract":
            score = last(run.metrics.get("eval/score", []))
            scaled = math.nan if score is None else _SCALE * score
            final = math.nan if score is None or run.final_return is None else run.final_return
            rows.append((f"{run.model} {run.size}", str(run.config.task), scaled, final))
    return pd.DataFrame(rows, columns=["arm", "task", "score", "final"])


def _cell(policies: pd.DataFrame) -> str:
    """Text of a cell: the scores of one task's policies with one model and size."""
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
    """Published sets with results for more than half of their tasks, and the set of all tasks with results."""
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
    """One row per task and one for the mean, with two errors per model and size; ``None`` without validations."""
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
    """One row per run, task and error, with the columns ``arm``, ``task``, ``error`` and ``value``."""
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
