"""The whole report: text for the terminal, ``report.html``, figures, and the files of a comparison.

``report.html`` is a single file that contains the tables and figures, for screen and print. This module imports pandas
and scipy, so commands import it only when they make a report.
"""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.report.collect import FAILED, RunReport
from pwm_torchrl.report.compare import Comparison, compare, compare_csv, compare_table, compare_tex, curves_csv
from pwm_torchrl.report.figures import (
    MOST_FIGURES,
    column_figures,
    comparison_figures,
    memory_figure,
    returns_figures,
)
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
from pwm_torchrl.report.select import Pairs
from pwm_torchrl.report.tables import Table
from pwm_torchrl.run.drawing import png, require_matplotlib

__all__ = ["REPORT_FILE", "Document", "Section", "make_document", "render"]

# The HTML page: one file, for screen and print ------------------------------------------------------------------------


_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d6470; --line: #dcdfe4; --page: #ffffff; --band: #f5f6f8;
  --good: #00734f; --bad: #b3261e; --busy: #005b99; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b3; --line: #3a3f47; --page: #16181c;
  --band: #1f2228; --good: #5fcfa4; --bad: #ff8a80; --busy: #7fbdf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 2rem 3rem; max-width: 90rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .4rem 0; max-width: 65rem; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tbody:nth-of-type(even) { background: var(--band); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--busy); }
th[aria-sort] { color: var(--ink); } th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
a { color: var(--busy); }
.right { text-align: right; }
.words { white-space: normal; min-width: 6rem; max-width: 14rem; }
.name { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width: 22rem; }
.long { white-space: normal; overflow-wrap: anywhere; color: var(--soft); padding-left: 1.6rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .busy { color: var(--busy); }
figure { margin: .8rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --band: #f4f4f4; --good: #00573c; --bad: #8c1d18;
    --busy: #00406b; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  h2, .soft { break-after: avoid; }
  img { max-height: 150mm; width: auto; }
  figure, tr, p { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .35rem; white-space: normal; }
}
"""

# Sorts a table by the clicked column; a row's long texts are in the same tbody and move with it.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = body => body.rows[0].cells[column].dataset.key ?? body.rows[0].cells[column].textContent;
    const known = text => text !== "" && text !== "-";
    const order = (a, b) => known(a) !== known(b) ? (known(a) ? -1 : 1) : sign * (
      isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b);
    table.append(...[...table.tBodies].sort((a, b) => order(key(a), key(b))));
  }));
}
"""

_TONES = {"good": ("finished",), "bad": FAILED, "busy": ("running", "waiting")}


@dataclass
class Section:
    """A section of the page: heading, text, figures and a table.

    Attributes:
        pictures: PNG files by name.
        notes: sentences listed at the end.
    """

    title: str
    text: str = ""
    table: Table | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The HTML page: it loads no other files, and its script only sorts tables."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_CSS}</style></head>",
            f'<body><header><h1>{html.escape(title)}</h1><p class="soft">{html.escape(subtitle)}</p></header>',
            *map(_section, sections),
            f"<script>{_SCRIPT}</script>",
            "</body></html>",
            "",
        ]
    )


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f'<p class="soft">{html.escape(section.text)}</p>')
    parts += [_picture(name, content) for name, content in section.pictures.items()]
    if section.table is not None:
        parts.append(_table(section.table))
    if section.notes:
        parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in section.notes) + "</ul>")
    return "\n".join([*parts, "</section>"])


def _picture(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></figure>'


def _table(table: Table) -> str:
    """An HTML table with one ``tbody`` per row: its cells, and below them each long text on a full-width line."""
    long = table.wide | {"settings"}
    short = [name for name in table.head if name not in long and not table.blank(name)]
    styles = {name: _style(table, name) for name in short}
    head = [f"<th{_css(styles[name])}><button>{html.escape(name)}</button></th>" for name in short]
    head += [f"<th>{html.escape(name)}</th>" for name in table.links]
    rows = []
    for index, row in enumerate(table.rows):
        cells = dict(zip(table.head, row))
        texts = [_cell(table, name, index, _toned(name, styles[name], cells[name]), cells[name]) for name in short]
        texts += [f"<td>{' · '.join(_link(*each) for each in rows_of[index])}</td>" for rows_of in table.links.values()]
        rows.append(f"<tbody><tr>{''.join(texts)}</tr>")
        for name in table.head:
            if name in long and cells[name]:
                text = html.escape(f"{name}: {cells[name]}")
                rows.append(f'<tr><td class="long" colspan="{len(head)}">{text}</td></tr>')
        rows.append("</tbody>")
    return "\n".join(
        ['<div class="scroll"><table>', f"<thead><tr>{''.join(head)}</tr></thead>", *rows, "</table></div>"]
    )


def _cell(table: Table, name: str, row: int, style: str, text: str) -> str:
    """A cell, with its sort key if the key differs from the text."""
    keys = table.keys.get(name)
    key = "" if keys is None else f' data-key="{"" if keys[row] is None else repr(keys[row])}"'
    return f"<td{_css(style)}{key}>{html.escape(text)}</td>"


def _link(text: str, address: str) -> str:
    return f'<a href="{html.escape(address)}">{html.escape(text)}</a>'


def _style(table: Table, column: str) -> str:
    if table.right(column):
        return "right"
    return {"run": "name", "status": "words", "restarts": "words"}.get(column, "")


def _toned(column: str, style: str, cell: str) -> str:
    """The CSS classes of a cell; a status cell is coloured if all statuses in it have the same tone."""
    if column != "status":
        return style
    words = [part.lstrip("0123456789 ") for part in cell.split(", ")]
    tones = (tone for tone, statuses in _TONES.items() if all(word in statuses for word in words))
    return " ".join([style, *tones])


def _css(style: str) -> str:
    return f' class="{style}"' if style else ""


# Contents of the report -----------------------------------------------------------------------------------------------


REPORT_FILE = "report.html"

_CURVES = (
    "Mean over seeds, with a band of one standard deviation. A line is thin where not all seeds of its group have "
    "reached that point; between evaluations it is interpolated, and no seed is extended beyond its last evaluation."
)
_SUMMARY = (
    "Mean ± population standard deviation over seeds of the deterministic return, including unfinished runs; time is "
    "the mean over the runs, memory the maximum."
)
_LOSSES = (
    "Means over seeds with one standard deviation; logarithmic where all values are positive and span more than a "
    f"factor of ten. At most {MOST_FIGURES} environments have figures of losses and comparisons."
)
_RUNS = "Click a column's name to sort by it. Links point to the runs' present directories."
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
    """A report that has not been written to files yet.

    Attributes:
        text: tables for the terminal.
        files: contents by file name, :data:`REPORT_FILE` last.
        notes: sentences about figures that could not be drawn.
    """

    text: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_document(
    runs: Sequence[RunReport], source: str, out: Path, pairs: Pairs | None = None, width: int | None = None
) -> Document:
    """Make the tables, figures and page of a report.

    Args:
        runs: the runs.
        source: description of the runs' location and selection, for the page's subtitle.
        out: folder of the page; links to runs are relative to it.
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
    """PNG files by name; without matplotlib there are none, and a note says so."""
    try:
        require_matplotlib()
    except MissingLibraryError as missing:
        notes.append(f"no figures: {missing}")
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
    """Figures by file name; characters of an environment's name that are unsuitable for a file name are replaced."""
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
