"""The report's tables: one row per run, per group of seeds, and memory against plan."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from pwm_torchrl.report.collect import RunReport
from pwm_torchrl.report.grouping import Group
from pwm_torchrl.report.tables import Table, bytes_text, duration, number_text, reasons_text, seeds_text

__all__ = ["frame_of", "group_table", "memory_table", "run_table"]

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
}  # columns of a table, by what they are called in a RunReport
_FILES = (
    ("configuration", "config.yaml"),
    ("curves", "curves.png"),
    ("video", "video.mp4"),
    ("metrics", "metrics.csv"),
    ("log", "log.txt"),
)  # linked from the page where a run has them
_LABELS = ("name", *_NAMES, "status")


def frame_of(runs: Sequence[RunReport]) -> pd.DataFrame:
    """Runs as a table of values: a row per run, floats with NaN where a value is not known.

    Returns:
        Columns ``name``, ``model``, ``size``, ``env``, ``status``, ``seed``, ``peak``, ``final``, ``random``,
        ``epochs``, ``planned``, ``time`` (s), ``host``, ``GPU`` (bytes, no GPU memory counts as unknown),
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
        out: the folder of the page, whose links are relative to it. Defaults to ``None``: no links.
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
    """What a run has to look at: its directory, files that are there, and its page at W&B."""
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
    """Measured peaks beside the plan's predictions, one row per run that has a plan."""
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
    """Numbers behind the cells of a table, by which a page sorts its rows."""
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
