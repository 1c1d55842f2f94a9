"""The report as a whole: text for the terminal, ``report.html``, figures, and the files of a comparison.

Imports pandas and scipy, so a command imports it only once it makes a report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.report.collect import RunReport
from pwm_torchrl.report.compare import Comparison, compare, compare_csv, compare_table, compare_tex, curves_csv
from pwm_torchrl.report.figures import (
    MOST_FIGURES,
    column_figures,
    comparison_figures,
    memory_figure,
    returns_figures,
)
from pwm_torchrl.report.page import Section, render
from pwm_torchrl.report.pairing import Pairs
from pwm_torchrl.report.run_tables import (
    HELD_OUT_TEXT,
    SCORE_TEXT,
    Group,
    group_runs,
    group_table,
    held_out_table,
    memory_table,
    run_table,
    score_table,
)
from pwm_torchrl.run.drawing import png, require_matplotlib

__all__ = ["REPORT_FILE", "Document", "make_document"]

REPORT_FILE = "report.html"

_CURVES = (
    "Mean over seeds, with a band of one standard deviation. A line is thin where not all seeds of its group have "
    "arrived; between evaluations it is interpolated, and no seed is extended beyond its last evaluation."
)
_SUMMARY = (
    "Mean ± population standard deviation over seeds of the deterministic return, as far as each run has come; time is "
    "the mean per run, memory the most of any run."
)
_LOSSES = (
    "Means over seeds with one standard deviation; logarithmic where all values are positive and span more than a "
    f"factor of ten. At most {MOST_FIGURES} environments have figures of losses and comparisons."
)
_RUNS = "Click a column's name to sort by it. Files are linked where the runs lie now."
_HELD_OUT = ("validation/loss", "validation/latent_mse", "validation/reward_nmse")
_MEMORY = (
    "Host memory is the anonymous and shared memory of all processes of a run, excluding memory-mapped files; GPU "
    "memory is what PyTorch's allocator held. The figure shows, for each model, size and environment, the run that "
    "held most."
)
_COMPARISON = (
    "Interquartile means over seeds with 95 % percentile bootstrap intervals. With fewer than four seeds nothing is "
    "cut, so the value is their mean; with few seeds the intervals are too narrow. Estimates are over runs that "
    "finished; curves are over all runs that reach a point, thin where not all do. Differences are taken seed by seed. "
    "Hours exclude work that was lost and repeated after a restart."
)


@dataclass
class Document:
    """A report that is not written yet.

    Attributes:
        text: tables for the terminal.
        files: contents by file name, :data:`REPORT_FILE` last.
        notes: sentences about what could not be drawn.
    """

    text: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_document(
    runs: Sequence[RunReport], source: str, out: Path, pairs: Pairs | None = None, width: int | None = None
) -> Document:
    """Makes the tables, figures and page of some runs.

    Args:
        runs: the runs.
        source: where they are from and how they were selected, for the page's subtitle.
        out: the folder that the page will be in, which its links to runs are relative to.
        pairs: the runs to compare. Defaults to ``None``: no comparison.
        width: terminal columns. Defaults to ``None``: no limit.
    """
    groups = group_runs(runs)
    comparison = None if pairs is None else compare(pairs)
    document = Document(_text(runs, groups, comparison, width))
    figures = _figures(groups, comparison, document.notes)
    document.files.update({f"{name}.png": content for name, content in figures.items()})
    if comparison is not None:
        document.files["compare.csv"] = compare_csv(comparison)
        document.files["compare.tex"] = compare_tex(comparison)
        document.files["compare_curves.csv"] = curves_csv(comparison)
    document.files[REPORT_FILE] = _page(runs, groups, comparison, figures, source, out)
    return document


def _text(runs: Sequence[RunReport], groups: Sequence[Group], comparison: Comparison | None, width: int | None) -> str:
    blocks = [run_table(runs).text(width)]
    errors = [f"{run.name}: {run.last_error}" for run in runs if run.last_error]
    if errors:
        blocks.append("\n".join(["last errors:", *(f"  {line}" for line in errors)]))
    if len(groups) < len(runs):
        blocks.append(group_table(groups).text(width))
    scores = score_table(runs)
    if scores is not None:
        blocks.append(f"normalised scores, 0 to 100:\n{scores.text(width)}")
    held_out = held_out_table(runs)
    if held_out is not None:
        blocks.append(f"errors on held-out episodes:\n{held_out.text(width)}")
    if comparison is not None:
        notes = [f"note: {note}" for note in comparison.notes]
        blocks.append("\n".join([compare_table(comparison).text(width), *notes]))
    return "\n\n".join(blocks)


def _figures(groups: Sequence[Group], comparison: Comparison | None, notes: list[str]) -> dict[str, bytes]:
    """PNG files by name; without matplotlib none, and a note."""
    try:
        require_matplotlib()
    except MissingLibraryError as missing:
        notes.append(f"no pictures: {missing}")
        return {}
    pages = returns_figures(groups)
    found = {"report_returns" + (f"_{n}" if n > 1 else ""): page for n, page in enumerate(pages, 1)}
    if not pages:
        notes.append("curves: none yet, no run has logged a return")
    if comparison is not None:
        found.update(_named("compare", comparison_figures(comparison)))
    found.update(_named("report_losses", column_figures(groups, "loss/")))
    found.update(_named("report_held_out", column_figures(groups, _HELD_OUT)))
    memory = memory_figure(groups)
    if memory is not None:
        found["report_memory"] = memory
    envs = len({group.env for group in groups})
    if envs > MOST_FIGURES:
        notes.append(f"losses and comparisons are drawn for {MOST_FIGURES} of {envs} environments")
    return {name: png(figure) for name, figure in found.items()}


def _named(prefix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by file name; characters of an environment's name that do not belong in one are replaced."""
    return {f"{prefix}_{''.join(c if c.isalnum() or c in '._-' else '-' for c in k)}": v for k, v in figures.items()}


def _page(
    runs: Sequence[RunReport],
    groups: Sequence[Group],
    comparison: Comparison | None,
    figures: Mapping[str, bytes],
    source: str,
    out: Path,
) -> str:
    def those(prefix: str) -> dict[str, bytes]:
        return {name: content for name, content in figures.items() if name.startswith(prefix)}

    statuses = Counter(run.status for run in runs)
    counts = ", ".join(f"{n} {status}" for status, n in statuses.most_common())
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    subtitle = " · ".join([source, f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {counts}", made])
    sections = [Section("Summary", _SUMMARY, group_table(groups))]
    if comparison is not None:
        text = f"Baseline: {comparison.key}={comparison.arms[0]}. {_COMPARISON}"
        table, notes = compare_table(comparison), comparison.notes
        sections.append(Section(f"Comparison of {comparison.key}", text, table, those("compare"), notes))
    scores = score_table(runs)
    if scores is not None:
        sections.append(Section("Scores", SCORE_TEXT, scores))
    held_out = held_out_table(runs)
    if held_out is not None:
        sections.append(Section("Held-out errors", HELD_OUT_TEXT, held_out, those("report_held_out")))
    sections.append(Section("Learning curves", _CURVES, pictures=those("report_returns")))
    sections.append(Section("Losses", _LOSSES, pictures=those("report_losses")))
    sections.append(Section("Memory against plan", _MEMORY, memory_table(runs), those("report_memory")))
    sections.append(Section("Runs", _RUNS, run_table(runs, out)))
    shown = [s for s in sections if s.pictures or (s.table is not None and s.table.rows)]
    return render("Report of runs", subtitle, shown)
