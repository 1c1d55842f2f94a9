"""Learning curves of several runs in one picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.launch.report import RunReport

__all__ = ["plot_curves", "read_metrics"]

_RETURNS = (
    ("eval/return_mean", "deterministic return"),
    ("train/return", "return while collecting"),
)


def read_metrics(file: Path) -> dict[str, list[float]]:
    """Columns of a ``metrics.csv``; nothing where there is no file yet, or no readable one."""
    from pwm_torchrl.training import metrics  # imports torch, which the commands' help need not wait for

    try:
        return metrics.read_metrics(file)
    except (OSError, csv.Error, ValueError):
        return {}


def plot_curves(reports: Sequence[RunReport], out: Path) -> bool:
    """Draws return over environment steps, one panel per environment and one line per run.

    Returns:
        Whether there was anything to draw.

    Raises:
        ConfigurationError: if matplotlib is missing or ``out`` cannot be written.
    """
    curves = [(report, *curve) for report in reports if (curve := _curve(report)) is not None]
    if not curves:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("matplotlib is not installed; pip install 'pwm-torchrl[plot]'") from error
    envs = list(dict.fromkeys(str(report.facts["env"]) for report, *_ in curves))
    columns = min(3, len(envs))
    figure = Figure(figsize=(6.4 * columns, 4.2 * math.ceil(len(envs) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(envs) / columns), columns, squeeze=False).ravel()
    for panel in panels[len(envs) :]:
        panel.set_visible(False)
    models = sorted({_label(report) for report, *_ in curves})
    for report, x, y, spread, what in curves:
        panel = panels[envs.index(str(report.facts["env"]))]
        colour = f"C{models.index(_label(report)) % 10}"
        status = report.facts["status"]
        name = f"{_label(report)} s{report.facts['seed']}" + ("" if status == "finished" else f" ({status})")
        panel.plot(
            x,
            y,
            color=colour,
            label=name,
            linewidth=1.5,
            linestyle="-" if status == "finished" else "--",
        )
        if spread is not None:
            low, high = ([v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_ylabel(what)
    for env, panel in zip(envs, panels, strict=False):
        panel.set(title=env, xlabel="environment steps")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--out={out} cannot be written: {error}") from error
    return True


def _label(report: RunReport) -> str:
    return f"{report.facts['model']} {report.facts['size']}"


def _curve(report: RunReport) -> tuple[list[float], list[float], list[float] | None, str] | None:
    """Steps, returns, spread and the name of the return; evaluations where there are any."""
    metrics = report.metrics
    steps = metrics.get("env_steps") or metrics.get("epoch") or []
    for key, what in _RETURNS:
        values = metrics.get(key, [])
        spread = metrics.get("eval/return_std") if key == "eval/return_mean" else None
        kept = [i for i, (x, y) in enumerate(zip(steps, values, strict=False)) if math.isfinite(x + y)]
        if kept:
            band = [s if math.isfinite(s) else 0.0 for s in (spread[i] for i in kept)] if spread else None
            return [steps[i] for i in kept], [values[i] for i in kept], band, what
    return None
