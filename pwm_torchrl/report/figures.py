"""Figures of the report. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pwm_torchrl.memory.readings import GIB
from pwm_torchrl.report.collect import natural
from pwm_torchrl.report.compare import AXES, Comparison
from pwm_torchrl.report.run_tables import Group
from pwm_torchrl.report.statistics import aligned, curve, mean_and_spread, thin
from pwm_torchrl.run.drawing import COLORS, draw_line, finish_axis, log_where_wide, new_figure, styled
from pwm_torchrl.run.metrics import progress_axis

__all__ = [
    "MOST_FIGURES",
    "column_figures",
    "comparison_figures",
    "memory_figure",
    "returns_figures",
]

MOST_FIGURES = 12  # maximum number of environments with their own figure, and of panels per figure of returns

_DASHES = ("-", "--", "-.", ":")  # line styles, for more lines than colours
_MOST_BARS = 40  # maximum per panel of the memory figure
_MOST_LEGEND = 24  # maximum number of legend entries
_COLUMNS = 3
_PANELS = {1: (7.5, 3.8), 2: (4.9, 3.3), 3: (3.5, 2.8)}  # inches, by the number of columns
_RETURNS = (("eval/return_mean", "evaluation return"), ("train/return", "return while collecting"))


def returns_figures(groups: Sequence[Group], most: int = MOST_FIGURES) -> list[Any]:
    """Return over environment steps: one panel per environment and one line per group.

    Runs without environment steps are drawn over epochs. A line is the mean over seeds, thin where it does not include
    all seeds; its band is one standard deviation over seeds, and a single seed has none. Evaluation returns are drawn
    if any run in the environment has them, else returns while collecting.

    Args:
        groups: the runs.
        most: maximum number of panels per figure. Defaults to ``12``.

    Returns:
        Figures; none if no run has logged a return.
    """
    panels = []
    for env in dict.fromkeys(group.env for group in groups):
        here = [group for group in groups if group.env == env]
        over = _over(here)
        for column, label in _RETURNS:
            drawn = [(group, found) for group in here if (found := _curves(group, column, over[0]))]
            if drawn:
                panels.append((env, label, over[1], drawn))
                break
    style, figures = _Styles([group.label for group in groups]), []
    for start in range(0, len(panels), most):
        page = panels[start : start + most]
        with styled():
            figure, axes = _panels(len(page))
            for axis, (env, label, steps, drawn) in zip(axes, page):
                for group, curves in drawn:
                    _mean_line(axis, curves, len(group.runs), **style[group.label])
                finish_axis(axis, _short(str(env)), steps, label)
            _legend(figure, axes)
        figures.append(figure)
    return figures


def column_figures(groups: Sequence[Group], columns: str | Sequence[str], most: int = MOST_FIGURES) -> dict[str, Any]:
    """Columns of ``metrics.csv`` over environment steps: one figure per environment, one panel per column.

    Args:
        groups: the runs.
        columns: names of the columns, or their common prefix such as ``"loss/"``.
        most: maximum number of environments. Defaults to ``12``.

    Returns:
        Figures by environment, drawn as in :func:`returns_figures`.
    """
    style = _Styles([group.label for group in groups])
    figures = {}
    for env in list(dict.fromkeys(group.env for group in groups))[:most]:
        here = [group for group in groups if group.env == env]
        over = _over(here)
        logged = dict.fromkeys(name for group in here for run in group.runs for name in run.metrics)
        names = [n for n in logged if n.startswith(columns)] if isinstance(columns, str) else columns
        panels = [(name, [(g, c) for g in here if (c := _curves(g, name, over[0]))]) for name in names]
        panels = [(name, drawn) for name, drawn in panels if drawn]
        if not panels:
            continue
        with styled():
            figure, axes = _panels(len(panels))
            for axis, (name, drawn) in zip(axes, panels):
                for group, curves in drawn:
                    _mean_line(axis, curves, len(group.runs), **style[group.label])
                log_where_wide(axis, pd.concat([points for _, curves in drawn for points in curves]))
                finish_axis(axis, _short(name.partition("/")[2]), over[1])
            _heading(figure, str(env))
            _legend(figure, axes)
        figures[str(env)] = figure
    return figures


def memory_figure(groups: Sequence[Group]) -> Any | None:
    """Measured peaks (bars) and predictions (marks) of each group's largest run; ``None`` without measurements."""
    places: list[tuple[str, list[tuple[str, float, float | None]]]] = []
    for title, measured, planned in (
        ("host memory", "host_bytes", "host_planned"),
        ("GPU memory", "device_bytes", "device_planned"),
    ):
        known = []
        for group in groups:
            run = max(group.runs, key=lambda run: getattr(run, measured) or 0)
            if getattr(run, measured):
                known.append((f"{group.env} {group.label}", getattr(run, measured), getattr(run, planned)))
        if known:
            least = sorted(amount for _, amount, _ in known)[-_MOST_BARS:][0]
            shown = [entry for entry in known if entry[1] >= least][:_MOST_BARS]
            places.append((title + (f", {len(shown)} of {len(known)}" if len(known) > len(shown) else ""), shown))
    if not places:
        return None
    size = (10.5, 1.1 + 0.27 * max(len(entries) for _, entries in places))
    with styled():
        figure, axes = _panels(len(places), columns=1, size=size)
        for axis, (title, entries) in zip(axes, places):
            y = np.arange(len(entries))[::-1]
            axis.barh(y, [m / GIB for _, m, _ in entries], color=COLORS[5], height=0.62, label="measured peak")
            marks = [(at, p / GIB) for at, (_, _, p) in zip(y, entries) if p is not None]
            if marks:
                x, y_low, y_high = ([p for _, p in marks], *([at + s * 0.42 for at, _ in marks] for s in (-1, 1)))
                axis.vlines(x, y_low, y_high, color=COLORS[1], linewidth=2.2, label="predicted by the plan")
            axis.set_yticks(y, [name for name, _, _ in entries])
            axis.set(title=title, xlabel="GiB", xlim=(0, None), ylim=(-0.7, len(entries) - 0.3))
            axis.grid(axis="y", visible=False)
        _legend(figure, axes)
    return figure


def comparison_figures(comparison: Comparison, most: int = MOST_FIGURES) -> dict[str, Any]:
    """Interquartile mean of the return over steps, wall-clock hours and GPU-hours, one figure per environment."""
    style = _Styles(sorted(comparison.arms, key=natural))  # this order gives the same colours as in the other figures
    figures = {}
    for env, here in list(comparison.curves.groupby("env", sort=False))[:most]:
        shown = [axis for axis in AXES if (here["axis"] == axis).any()]
        with styled():
            figure, panels = _panels(len(shown))
            for panel, axis in zip(panels, shown):
                for arm, c in here[here["axis"] == axis].groupby("arm", sort=False):
                    complete = c["runs"] == c["runs"].max()
                    _partly_strong(panel, c["x"], c["iqm"], c["low"], c["high"], complete, **style[str(arm)])
                finish_axis(panel, "", AXES[axis], "return, IQM over seeds", steps=axis in ("env_steps", "epoch"))
            _heading(figure, str(env))
            _legend(figure, panels)
        figures[str(env)] = figure
    return figures


class _Styles:
    """Colour and line style by label, the same in every panel."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.order = list(dict.fromkeys(labels))

    def __getitem__(self, label: str) -> dict[str, Any]:
        index = self.order.index(label)
        dash = _DASHES[index // len(COLORS) % len(_DASHES)]
        return {"color": COLORS[index % len(COLORS)], "linestyle": dash, "label": label}


def _over(groups: Sequence[Group]) -> tuple[str, str]:
    """Column and label of the x axis for these groups."""
    return progress_axis(run.metrics for group in groups for run in group.runs if run.metrics)


def _curves(group: Group, column: str, over: str) -> list[pd.Series]:
    found = (curve(run.metrics, column, over) for run in group.runs)
    return [thin(points) for points in found if len(points)]


def _mean_line(axis: Any, curves: Sequence[pd.Series], seeds: int, **style: Any) -> None:
    """Draw the mean of a group's curves, with their spread where there are two or more."""
    found = mean_and_spread(aligned(curves))
    mean, spread = found["mean"], found["spread"].where(found["count"] > 1)
    _partly_strong(axis, found.index, mean, mean - spread, mean + spread, found["count"] == seeds, **style)


def _partly_strong(axis: Any, x: Any, y: Any, low: Any, high: Any, complete: Any, **style: Any) -> None:
    """Draw a line with its band, thick where ``complete`` is true and thin elsewhere."""
    x, y, low, high, complete = (np.asarray(each) for each in (x, y, low, high, complete))
    draw_line(axis, x, y, **{**style, "linewidth": 0.9, "alpha": 0.75, "label": None})
    draw_line(axis, x, np.where(complete, y, np.nan), low, high, **style)


def _short(text: str, most: int = 30) -> str:
    """A panel's title, shortened in the middle so that it does not run into the next panel."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


def _heading(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below all panels, which are too small for legends of their own."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    shown = dict(list(found.items())[:_MOST_LEGEND])
    width = figure.get_size_inches()[0]
    longest = max(map(len, shown), default=1)
    columns = max(1, min(len(shown), int(width / (0.075 * longest + 0.5))))
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=columns)


def _panels(count: int, columns: int = _COLUMNS, size: tuple[float, float] | None = None) -> tuple[Any, list[Any]]:
    """A figure and its panels; ``size`` is the size of one panel in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width, height = size or _PANELS[columns]
    figure = new_figure((width * columns, height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
