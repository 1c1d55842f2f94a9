"""The pictures of a report, as PNG. Needs matplotlib and, for the colours of a run's own curves, torch."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.memory.readings import GIB
from pwm_torchrl.report.collect import natural
from pwm_torchrl.report.compare import AXES, Comparison
from pwm_torchrl.report.statistics import Array, Curve, Group, common_grid, curve, mean_and_spread, on_grid, thin
from pwm_torchrl.run.artifacts import COLORS, STYLE, format_steps
from pwm_torchrl.run.metrics import progress_axis

__all__ = [
    "MOST_PICTURES",
    "comparison_figures",
    "losses_figures",
    "memory_figure",
    "require_matplotlib",
    "returns_figures",
]

MOST_PICTURES = 12  # environments that get one of their own, at most; or a panel each in a shared one

_DPI = 130
_DASHES = ("-", "--", "-.", ":")  # of the lines after as many as there are colours
_MOST_BARS = 40  # in the memory picture, at most
_MOST_LEGEND = 24  # lines named in a legend, at most
_COLUMNS = 3
_PANELS = {1: (7.5, 3.8), 2: (4.9, 3.3), 3: (3.5, 2.8)}  # inches, by the number of columns


def require_matplotlib() -> None:
    """Raises :class:`MissingLibraryError` if there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError("matplotlib is not installed; pip install 'pwm-torchrl[plot]'") from error


def returns_figures(groups: Sequence[Group]) -> list[bytes]:
    """Return over environment steps, one panel per environment and one line per group: the mean over its seeds.

    Where a run takes no environment steps, over epochs.

    The band is the standard deviation over seeds. A line is thin where not all seeds reach, and a single seed has no
    band. Evaluations are drawn where a run of the environment has some, else returns while collecting.

    Returns:
        The pictures, each of a page of environments; none where there is nothing to draw.
    """
    panels = []
    for env in dict.fromkeys(group.env for group in groups):
        here = [group for group in groups if group.env == env]
        over = _over(here)
        for column, what in (("eval/return_mean", "evaluation return"), ("train/return", "return while collecting")):
            drawn = [(group, found) for group in here if (found := _curves(group, column, over[0]))]
            if drawn:
                panels.append((env, what, over[1], drawn))
                break
    style, pictures = _Styles([group.label for group in groups]), []
    for start in range(0, len(panels), MOST_PICTURES):
        page = panels[start : start + MOST_PICTURES]
        with _figure(len(page), _COLUMNS) as (figure, axes):
            for axis, (env, what, steps, drawn) in zip(axes, page):
                for group, curves in drawn:
                    _band(axis, curves, len(group.runs), **style[group.label])
                axis.set(title=_short(str(env)), xlabel=steps, ylabel=what)
                _steps(axis)
            _legend(figure, axes)
            pictures.append(_png(figure))
    return pictures


def losses_figures(groups: Sequence[Group]) -> dict[str, bytes]:
    """Losses over environment steps, one picture per environment and one panel per loss, as :func:`returns_figures`."""
    style = _Styles([group.label for group in groups])
    pictures = {}
    for env in list(dict.fromkeys(group.env for group in groups))[:MOST_PICTURES]:
        here = [group for group in groups if group.env == env]
        over = _over(here)
        names = dict.fromkeys(n for g in here for run in g.runs for n in run.metrics if n.startswith("loss/"))
        panels = [(name, [(g, c) for g in here if (c := _curves(g, name, over[0]))]) for name in names]
        panels = [(name, drawn) for name, drawn in panels if drawn]
        if not panels:
            continue
        with _figure(len(panels), _COLUMNS) as (figure, axes):
            for axis, (name, drawn) in zip(axes, panels):
                for group, curves in drawn:
                    _band(axis, curves, len(group.runs), **style[group.label])
                values = np.concatenate([y for _, curves in drawn for _, y in curves])
                if values.min() > 0 and values.max() > 10 * values.min():
                    axis.set_yscale("log")
                axis.set(title=_short(name.removeprefix("loss/")), xlabel=over[1])
                _steps(axis)
            _head(figure, str(env))
            _legend(figure, axes)
            pictures[str(env)] = _png(figure)
    return pictures


def memory_figure(groups: Sequence[Group]) -> bytes | None:
    """Measured peaks as bars and predictions as marks: of each group the run that holds most; ``None`` without any."""
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
    with _figure(len(places), 1, size=size) as (figure, axes):
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
        return _png(figure)


def comparison_figures(comparison: Comparison) -> dict[str, bytes]:
    """Interquartile mean of the return over steps, wall-clock and GPU-hours, one picture per environment."""
    style = _Styles(sorted(comparison.arms, key=natural))  # the order, so the colours, of the other pictures
    pictures = {}
    for env in list(dict.fromkeys(c.env for c in comparison.curves))[:MOST_PICTURES]:
        here = [c for c in comparison.curves if c.env == env]
        axes_here = [axis for axis in AXES if any(c.axis == axis for c in here)]
        with _figure(len(axes_here), _COLUMNS) as (figure, axes):
            for panel, axis in zip(axes, axes_here):
                for c in (c for c in here if c.axis == axis):
                    _line(panel, c.x, c.mean, c.low, c.high, c.count == c.count.max(), **style[c.arm])
                panel.set(xlabel=AXES[axis], ylabel="return, IQM over seeds")
                if axis in ("env_steps", "epoch"):
                    _steps(panel)
            _head(figure, env)
            _legend(figure, axes)
            pictures[env] = _png(figure)
    return pictures


class _Styles:
    """Colour and dashes by label, the same in every panel."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.order = list(dict.fromkeys(labels))

    def __getitem__(self, label: str) -> dict[str, Any]:
        index = self.order.index(label)
        dash = _DASHES[index // len(COLORS) % len(_DASHES)]
        return {"color": COLORS[index % len(COLORS)], "linestyle": dash, "label": label}


def _over(groups: Sequence[Group]) -> tuple[str, str]:
    """Column and name of what the curves of these groups are drawn over."""
    return progress_axis(run.metrics for group in groups for run in group.runs if run.metrics)


def _curves(group: Group, column: str, over: str) -> list[Curve]:
    found = (curve(run.metrics, column, over) for run in group.runs)
    return [thin(points) for points in found if len(points[0])]


def _band(axis: Any, curves: Sequence[Curve], seeds: int, **style: Any) -> None:
    """Mean of a group's curves, with their spread where there are two or more."""
    grid = common_grid(curves)
    mean, spread, count = mean_and_spread(on_grid(curves, grid))
    spread = np.where(count > 1, spread, np.nan)
    _line(axis, grid, mean, mean - spread, mean + spread, count == seeds, **style)


def _line(axis: Any, x: Array, y: Array, low: Array, high: Array, complete: Any, **style: Any) -> None:
    """A line, strong where all runs reach, and its band."""
    thin_style = {**style, "linewidth": 0.9, "alpha": 0.75, "label": None}
    marker = {"marker": "o", "markersize": 3} if len(x) == 1 else {}  # one point makes no line
    axis.plot(x, y, **thin_style, **marker)
    axis.plot(x, np.where(complete, y, np.nan), **style)
    if np.isfinite(low).any():
        axis.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _steps(axis: Any) -> None:
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(format_steps)
    axis.margins(x=0.02)


def _short(text: str, most: int = 30) -> str:
    """A panel's title, without its middle if it would reach into the next panel."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


def _head(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them: no panel has room for ten lines."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    shown = dict(list(found.items())[:_MOST_LEGEND])
    width = figure.get_size_inches()[0]
    longest = max(map(len, shown), default=1)
    columns = max(1, min(len(shown), int(width / (0.075 * longest + 0.5))))
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=columns)


@contextmanager
def _figure(panels: int, columns: int, size: tuple[float, float] | None = None) -> Iterator[tuple[Any, list[Any]]]:
    """A figure without pyplot, so without global state or a display, and its panels."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    width, height = size or _PANELS[columns]
    with rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout=ConstrainedLayoutEngine(w_pad=0.1))
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
        for axis in axes[panels:]:
            axis.set_visible(False)
        yield figure, axes[:panels]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
