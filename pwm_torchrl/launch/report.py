"""``launch/report.py``: a table and the learning curves of runs, finished or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch import console
from pwm_torchrl.launch.curves import plot_curves, read_metrics
from pwm_torchrl.launch.evaluate import ArgumentParser
from pwm_torchrl.launch.run_dir import CONFIG_FILE, load_config, read_summary

__all__ = ["RunReport", "find_runs", "main", "read_run", "table"]

_DEPTH = 4  # how deep below a given folder runs are looked for


@dataclass
class RunReport:
    """What is known of a run, whatever state it is in.

    Attributes:
        path: the run's directory.
        facts: the columns of the table, ``None`` where unknown.
        metrics: columns of ``metrics.csv``, floats with NaN where a row has none.
    """

    path: Path
    facts: dict[str, Any]
    metrics: dict[str, list[float]]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the curves."""
    parser = ArgumentParser(prog="python launch/report.py", description="Table and learning curves of runs.")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="run directories, or folders that hold them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="PNG",
        help="where the curves go (default: report.png)",
    )
    args = parser.parse_args(argv)
    reports = [read_run(path) for path in find_runs(args.runs)]
    reports.sort(key=lambda r: [*(str(r.facts[k]) for k in ("env", "size", "model")), r.path.name])
    console.say(table(reports))
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.png"
    if plot_curves(reports, out):
        console.say(f"curves: {out}")
    else:
        console.say("curves: none yet, no run has logged a return")
    return console.OK


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and below ``paths``, each once.

    Raises:
        ConfigurationError: if a path does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigurationError(f"{path} is not a directory; give run directories, or folders that hold them")
        here = [path] if (path / CONFIG_FILE).is_file() else []
        for depth in range(1, 0 if here else _DEPTH):
            here += [f.parent for f in path.glob("*/" * depth + CONFIG_FILE)]
        if not here:
            raise ConfigurationError(f"{path} holds no run: there is no {CONFIG_FILE} in it or below it")
        found.update({p.resolve(): p for p in here})
    return list(found.values())


def read_run(path: Path) -> RunReport:
    """Reads a run; what its summary does not say yet is taken from its metrics and its
    configuration.
    """
    summary, metrics = read_summary(path), read_metrics(path / "metrics.csv")
    facts = {
        k: summary.get(k) for k in ("model", "size", "env", "seed", "peak_return", "final_return", "random_return")
    }
    facts.update({k: summary.get(k) for k in ("epochs_done", "epochs_planned", "status", "env_steps")})
    try:
        config = load_config(path)
        known = {
            "model": config.model.name,
            "size": config.size.name,
            "env": config.env.get("name"),
        }
        known.update(seed=config.seed, epochs_planned=config.training.epochs)
    except ConfigurationError:
        known = {}  # written by another version: the summary has to do
    returns = [v for v in metrics.get("eval/return_mean", []) if math.isfinite(v)]
    if returns:
        known.update(peak_return=max(returns), final_return=returns[-1])
    epochs = [v for v in metrics.get("epoch", []) if math.isfinite(v)]
    known.update(epochs_done=int(epochs[-1]) if epochs else 0, status="running" if metrics else "not started")
    facts.update({k: v for k, v in known.items() if facts.get(k) is None})
    if facts["status"] == "running" and epochs:
        facts["epochs_done"] = max(int(epochs[-1]), facts["epochs_done"] or 0)
    return RunReport(path, facts, metrics)


def table(reports: Sequence[RunReport]) -> str:
    """The runs as aligned text, one line each."""
    head = ["model", "size", "env", "seed", "peak", "final", "random", "epochs", "status", "run"]
    rows = [head]
    for report in reports:
        f = report.facts
        returns = [_number(f[k]) for k in ("peak_return", "final_return", "random_return")]
        epochs = f"{_text(f['epochs_done'])}/{_text(f['epochs_planned'])}"
        rows.append([_text(f[k]) for k in ("model", "size", "env", "seed")] + returns)
        rows[-1] += [
            epochs,
            _text(f["status"]),
            report.path.name or str(report.path.resolve().name),
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = {"seed", "peak", "final", "random", "epochs"}
    lines = []
    for row in rows:
        cells = (c.rjust(w) if h in right else c.ljust(w) for c, w, h in zip(row, widths, head, strict=True))
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"
