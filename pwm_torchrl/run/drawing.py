"""Figures: the common style of a run's curves and the report, and ``curves.png``. Needs matplotlib.

Figures are built without pyplot, so that they need no display and do not change a user's own figures.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.files import replacing
from pwm_torchrl.run.directory import read_summary
from pwm_torchrl.run.metrics import progress_axis, read_metrics

__all__ = [
    "COLORS",
    "draw_line",
    "finish_axis",
    "format_steps",
    "log_where_wide",
    "new_figure",
    "png",
    "require_matplotlib",
    "run_figure",
    "write_curves",
]

Metrics = Mapping[str, Sequence[float]]
Array = npt.NDArray[np.float64]

# Okabe-Ito: eight colours that differ in print and for colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
}
DPI = 130
SMOOTH_ABOVE = 60  # points; longer series get a moving mean over a faint raw line
MAX_LINES = 8  # per panel of curves.png, one for each colour
_MOST_MARKERS = 40  # largest number of points of a line with markers
_WIDE = 10  # ratio of the largest to the smallest value above which an axis is logarithmic


# Building blocks ------------------------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raises :class:`~pwm_torchrl.errors.MissingLibraryError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError("matplotlib is not installed; pip install 'pwm-torchrl[plot]'") from error


def styled() -> AbstractContextManager[None]:
    """Applies the style; needed for saving as well as drawing, because matplotlib makes some ticks only on saving."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure with a constrained layout.

    Args:
        size: width and height in inches.

    Returns:
        A :class:`matplotlib.figure.Figure`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any, dpi: int = DPI) -> bytes:
    """The figure as a PNG file.

    Args:
        figure: from :func:`new_figure`.
        dpi: dots per inch. Defaults to ``130``.
    """
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def draw_line(
    axis: Any,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    low: npt.ArrayLike | None = None,
    high: npt.ArrayLike | None = None,
    **style: Any,
) -> None:
    """Draws a line, and a band between ``low`` and ``high`` where both are finite.

    Args:
        axis: the panel.
        x: ``[points]``.
        y: ``[points]``, NaN where the line is interrupted.
        low: ``[points]``. Defaults to ``None``: no band.
        high: likewise.
        style: style of the line, for matplotlib's ``plot``; a band needs ``color``.
    """
    if len(np.atleast_1d(np.asarray(x))) == 1:  # a line of one point is invisible
        style = {"marker": "o", "markersize": 3, **style}
    axis.plot(x, y, **style)
    if low is not None and high is not None and np.isfinite(np.asarray(low, dtype=np.float64)).any():
        axis.fill_between(x, low, high, color=style["color"], alpha=0.17, linewidth=0)


def log_where_wide(axis: Any, values: npt.ArrayLike) -> None:
    """Makes the y axis logarithmic if all values are positive and span more than a factor of ten."""
    finite = np.asarray(values, dtype=np.float64)
    if len(finite) and finite.min() > 0 and finite.max() > _WIDE * finite.min():
        axis.set_yscale("log")


def finish_axis(axis: Any, title: str, x_label: str, y_label: str = "", *, steps: bool = True) -> None:
    """Sets title, labels and ticks of a panel; a panel without lines shows "nothing logged".

    Args:
        axis: the panel.
        title: what it shows.
        x_label: name and unit of the x axis.
        y_label: likewise. Defaults to ``""``.

    Keyword Args:
        steps: whether x counts steps, written as ``20k``. Defaults to ``True``.
    """
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    if not axis.lines:
        axis.text(0.5, 0.5, "nothing logged", ha="center", va="center", color="#909090", transform=axis.transAxes)
        axis.set_xticks([])
        axis.set_yticks([])
        return
    if steps:
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter(format_steps)
    axis.margins(x=0.02)


def format_steps(value: float, _position: int | None = None) -> str:
    """Formats a tick of a step axis: ``20k``, ``1.5M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


# curves.png -----------------------------------------------------------------------------------------------------------


def write_curves(run_dir: str | os.PathLike[str]) -> Path:
    """Draws ``curves.png`` from ``metrics.csv``: returns, losses and gradient norms over environment steps.

    Args:
        run_dir: the run's directory.

    Returns:
        The picture's path.

    Raises:
        MissingLibraryError: if matplotlib is not installed.
        FileNotFoundError: if there is no ``metrics.csv``.
    """
    try:
        require_matplotlib()
    except MissingLibraryError as missing:
        raise MissingLibraryError(f"curves.png cannot be drawn: {missing}") from missing
    run_dir = Path(run_dir)
    content = png(run_figure(read_metrics(run_dir / "metrics.csv"), read_summary(run_dir), run_dir.name), dpi=110)
    target = run_dir / "curves.png"
    with replacing(target) as draft:
        draft.write_bytes(content)
    return target


def run_figure(metrics: Metrics, summary: Mapping[str, Any], name: str) -> Any:
    """The curves of one run.

    The evaluation return has a band of one standard deviation over episodes. Columns that are missing leave their
    panel empty. A run that takes no environment steps is drawn over epochs, and one that validates a world model shows
    its errors on held-out episodes instead of returns.

    Args:
        metrics: columns of ``metrics.csv``.
        summary: content of ``summary.json``.
        name: name of the run, used as title if the summary does not describe the run.

    Returns:
        A :class:`matplotlib.figure.Figure`.
    """
    errors = [column for column in metrics if column.startswith("validation/") and column != "validation/loss"]
    losses = [column for column in metrics if column.startswith("loss/")]
    actor = [column for column in losses if column.startswith("loss/actor")]
    critic = [column for column in losses if column.startswith("loss/critic")]
    model = [column for column in losses if column not in actor + critic]
    norms = [column for column in metrics if column.startswith("grad_norm/")]
    with styled():
        figure = new_figure((12, 6.6))
        below = ["model"] * 3 if errors else ["model", "actor", "critic"]
        panels: dict[str, Any] = figure.subplot_mosaic([["return", "return", "grad"], below])
        if errors:
            _draw_columns(panels["return"], metrics, errors, "Errors on held-out episodes, open loop")
        else:
            _draw_returns(panels["return"], metrics, summary)
            _draw_columns(panels["actor"], metrics, actor, "Actor loss")
            _draw_columns(panels["critic"], metrics, critic, "Critic loss")
        _draw_columns(panels["model"], metrics, model, "Model losses")
        _draw_columns(panels["grad"], metrics, norms, "Gradient norms before clipping")
        figure.suptitle(_title(summary, name), x=0.01, ha="left", fontsize=12)
    return figure


def _draw_returns(axis: Any, metrics: Metrics, summary: Mapping[str, Any]) -> None:
    _, x_label = progress_axis([metrics])
    steps, values = _series(metrics, "train/return")
    if len(steps):
        draw_line(axis, steps, values, color="#b0b0b0", linewidth=1, label="training episodes")
    steps, mean = _series(metrics, "eval/return_mean")
    if len(steps):
        deviation = dict(zip(*(column.tolist() for column in _series(metrics, "eval/return_std"))))
        spread = np.array([deviation.get(step, 0.0) for step in steps.tolist()])
        marker = {"marker": "o", "markersize": 3.5} if len(steps) <= _MOST_MARKERS else {}
        label = "evaluation, mean ± std of episodes"
        draw_line(axis, steps, mean, mean - spread, mean + spread, color=COLORS[0], label=label, **marker)
    random_return = summary.get("random_return")
    if isinstance(random_return, (int, float)) and math.isfinite(random_return):
        axis.axhline(random_return, color="#606060", linestyle=(0, (4, 3)), linewidth=1, label="random policy")
    finish_axis(axis, "Return", x_label)
    if axis.lines:
        axis.legend(loc="best")


def _draw_columns(axis: Any, metrics: Metrics, columns: Sequence[str], title: str) -> None:
    drawn = [(column, series) for column in columns if len((series := _series(metrics, column))[0])]
    for color, (column, (steps, values)) in zip(COLORS, drawn[:MAX_LINES]):
        if len(values) > SMOOTH_ABOVE:
            axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = moving_mean(values, max(3, len(values) // 40))
        draw_line(axis, steps, values, color=color, label=column.split("/", 1)[1])
    if drawn:
        log_where_wide(axis, np.concatenate([values for _, (_, values) in drawn]))
    if len(drawn) > MAX_LINES:
        title += f" (first {MAX_LINES} of {len(drawn)})"
    finish_axis(axis, title, progress_axis([metrics])[1])
    if drawn:
        axis.legend(loc="best")


def _series(metrics: Metrics, column: str) -> tuple[Array, Array]:
    """Environment steps, or epochs, and values of a column, where both are finite."""
    x = np.asarray(metrics.get(progress_axis([metrics])[0], ()), dtype=np.float64)
    y = np.asarray(metrics.get(column, ()), dtype=np.float64)
    if len(x) != len(y):
        return np.empty(0), np.empty(0)
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]


def moving_mean(values: Array, width: int) -> Array:
    """Mean over a centred window, which is shorter near both ends.

    Args:
        values: ``[points]``, finite.
        width: points of the window; an even width counts as the next odd one.
    """
    window = np.ones(2 * min(width // 2, (len(values) - 1) // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _title(summary: Mapping[str, Any], name: str) -> str:
    if not all(key in summary for key in ("env", "model", "size", "seed")):
        return name
    title = f"{summary['env']} · {summary['model']} · {summary['size']} · seed {summary['seed']}"
    status = summary.get("status")
    return title if status == "finished" or status is None else f"{title} · {status}"
