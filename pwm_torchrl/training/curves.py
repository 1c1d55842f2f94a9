"""``curves.png``: what a run's ``metrics.csv`` looks like."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.training.axis import progress_axis
from pwm_torchrl.training.metrics import read_metrics

__all__ = ["format_steps", "write_curves"]

Series = tuple[list[float], list[float]]

# Okabe-Ito: eight colours that stay apart in print and for colour-blind readers.
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
SMOOTH_ABOVE = 60  # points; longer series get a moving mean over a faint raw line
MAX_LINES = 8  # per panel, as many as there are colours


def write_curves(run_dir: str | os.PathLike[str]) -> Path:
    """Draws ``curves.png`` from ``metrics.csv``: returns, losses and gradient norms over environment steps.

    The evaluation return is drawn with its spread over episodes; columns that are missing leave their panel empty.
    Curves of a run that takes no environment steps are over epochs, and one that validates a world model shows its
    errors instead of returns.

    Args:
        run_dir: the run's directory.

    Returns:
        The picture's path.

    Raises:
        MissingLibraryError: if matplotlib is not installed.
        FileNotFoundError: if there is no ``metrics.csv``.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError("curves.png needs matplotlib: pip install 'pwm-torchrl[plot]'") from error

    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir / "metrics.csv")
    summary = _summary(run_dir)
    # The figure is built without pyplot: no global state, no display, safe beside a user's own figures.
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        errors = [name for name in metrics if name.startswith("validation/") and name != "validation/loss"]
        below = ["model"] * 3 if errors else ["model", "actor", "critic"]
        panels: dict[str, Any] = figure.subplot_mosaic([["return", "return", "grad"], below])
        if errors:
            _draw_lines(panels["return"], metrics, errors, "Errors on held-out episodes, open loop", log=True)
        else:
            _draw_returns(panels["return"], metrics, summary)
        losses = [name for name in metrics if name.startswith("loss/")]
        actor = [name for name in losses if name.startswith("loss/actor")]
        critic = [name for name in losses if name.startswith("loss/critic")]
        model = [name for name in losses if name not in actor + critic]
        _draw_lines(panels["model"], metrics, model, "Model losses", log=True)
        if not errors:
            _draw_lines(panels["actor"], metrics, actor, "Actor loss")
            _draw_lines(panels["critic"], metrics, critic, "Critic loss", log=True)
        norms = [name for name in metrics if name.startswith("grad_norm/")]
        _draw_lines(panels["grad"], metrics, norms, "Gradient norms before clipping", log=True)
        figure.suptitle(_title(run_dir, summary), x=0.01, ha="left", fontsize=12)
        target = run_dir / "curves.png"
        partial = target.with_name("curves.tmp.png")
        figure.savefig(partial, dpi=110)
    os.replace(partial, target)
    return target


def _draw_returns(axes: Any, metrics: dict[str, list[float]], summary: dict[str, Any]) -> None:
    steps, train = _series(metrics, "train/return")
    if steps:
        axes.plot(steps, train, color="#b0b0b0", linewidth=1, label="training episodes")
    steps, mean = _series(metrics, "eval/return_mean")
    if steps:
        color = COLORS[0]
        spread = dict(zip(*_series(metrics, "eval/return_std")))
        low = [m - spread.get(s, 0.0) for s, m in zip(steps, mean)]
        high = [m + spread.get(s, 0.0) for s, m in zip(steps, mean)]
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        marker = "o" if len(steps) <= 40 else None
        axes.plot(steps, mean, color=color, marker=marker, markersize=3.5, label="evaluation, mean ± std of episodes")
    random_return = summary.get("random_return")
    if isinstance(random_return, (int, float)) and math.isfinite(random_return):
        axes.axhline(random_return, color="#606060", linestyle=(0, (4, 3)), linewidth=1, label="random policy")
    _finish(axes, metrics, "Return", empty=not axes.lines)


def _draw_lines(axes: Any, metrics: dict[str, list[float]], names: list[str], title: str, *, log: bool = False) -> None:
    drawn = [(name, series) for name in names if (series := _series(metrics, name))[0]]
    for color, (name, (steps, values)) in zip(COLORS, drawn[:MAX_LINES]):
        label = name.split("/", 1)[1]
        if len(values) > SMOOTH_ABOVE:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = _moving_mean(values, max(3, len(values) // 40))
        axes.plot(steps, values, color=color, label=label)
    positive = [v > 0 for _, (_, values) in drawn for v in values]
    # A logarithmic axis only where every value has a place on it.
    if log and positive and all(positive):
        axes.set_yscale("log")
    if len(drawn) > MAX_LINES:
        title += f" (first {MAX_LINES} of {len(drawn)})"
    _finish(axes, metrics, title, empty=not drawn)


def _finish(axes: Any, metrics: dict[str, list[float]], title: str, *, empty: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel(progress_axis([metrics])[1])
    if empty:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", color="#909090", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.xaxis.set_major_formatter(format_steps)
    axes.margins(x=0.02)
    axes.legend(loc="best")


def format_steps(value: float, _position: int | None = None) -> str:
    """A number of steps as a tick says it: ``20k``, ``1.5M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _series(metrics: dict[str, list[float]], name: str) -> Series:
    """Environment steps, or epochs, and values of a column, where both are finite."""
    steps = metrics.get(progress_axis([metrics])[0], [])
    points = [(s, v) for s, v in zip(steps, metrics.get(name, [])) if math.isfinite(s) and math.isfinite(v)]
    return [s for s, _ in points], [v for _, v in points]


def _moving_mean(values: list[float], width: int) -> list[float]:
    """Mean over a centred window that shrinks at both ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = width // 2
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in bounds]


def _title(run_dir: Path, summary: dict[str, Any]) -> str:
    if not all(key in summary for key in ("env", "model", "size", "seed")):
        return run_dir.name
    title = f"{summary['env']} · {summary['model']} · {summary['size']} · seed {summary['seed']}"
    status = summary.get("status")
    return title if status == "finished" or status is None else f"{title} · {status}"


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        content = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
