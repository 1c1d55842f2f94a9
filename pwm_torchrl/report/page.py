"""``report.html``: one file that holds the tables and figures, for screen and print."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from pwm_torchrl.report.collect import FAILED
from pwm_torchrl.report.tables import Table

__all__ = ["Section", "render"]

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

# Sorts a table by the column that is clicked; a row's long texts lie in the same tbody and move with it.
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
    """A heading, and below it a text, figures and a table.

    Attributes:
        pictures: PNG files by their names.
        notes: sentences listed at the end.
    """

    title: str
    text: str = ""
    table: Table | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. It is one file: it loads nothing, and its script only sorts tables."""
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
    """A ``tbody`` per row: its cells, and below them a line for each long text, as wide as the table."""
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
    """A cell, with the number that it is sorted by if its text is not that number."""
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
    """The CSS class of a cell; a status that all runs of a row share has a colour."""
    if column != "status":
        return style
    words = [part.lstrip("0123456789 ") for part in cell.split(", ")]
    tones = (tone for tone, statuses in _TONES.items() if all(word in statuses for word in words))
    return " ".join([style, *tones])


def _css(style: str) -> str:
    return f' class="{style}"' if style else ""
