"""``report.html``: one file with everything in it, for a screen and for paper."""

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
.band { background: var(--band); }
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

_TONES = {"good": ("finished",), "bad": FAILED, "busy": ("running", "waiting")}


@dataclass
class Section:
    """A heading with sentences, a table and pictures below it.

    Attributes:
        pictures: PNG files by what they show.
        notes: listed below the rest.
    """

    title: str
    text: str = ""
    table: Table | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page, which loads nothing."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_CSS}</style></head>",
            f'<body><header><h1>{html.escape(title)}</h1><p class="soft">{html.escape(subtitle)}</p></header>',
            *map(_section, sections),
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
    """A row of cells per row; long text has a row of its own below, which is as wide as the table."""
    long = table.wide | {"settings"}
    short = [name for name in table.head if name not in long and not table.blank(name)]
    styles = {name: _style(table, name) for name in short}
    head = "".join(f"<th{_css(styles[name])}>{html.escape(name)}</th>" for name in short)
    rows = []
    for index, row in enumerate(table.rows):
        cells = dict(zip(table.head, row))
        texts = (f"<td{_css(_toned(n, styles[n], cells[n]))}>{html.escape(cells[n])}</td>" for n in short)
        band = _css("band" if index % 2 else "")
        rows.append(f"<tr{band}>{''.join(texts)}</tr>")
        for name in table.head:
            if name in long and cells[name]:
                text = html.escape(f"{name}: {cells[name]}")
                rows.append(f'<tr{band}><td class="long" colspan="{len(short)}">{text}</td></tr>')
    return "\n".join(
        ['<div class="scroll"><table>', f"<thead><tr>{head}</tr></thead><tbody>", *rows, "</tbody></table></div>"]
    )


def _style(table: Table, column: str) -> str:
    if table.right(column):
        return "right"
    return {"run": "name", "status": "words", "restarts": "words"}.get(column, "")


def _toned(column: str, style: str, cell: str) -> str:
    """The class of a cell; a status that is the same for all runs of a row has a colour."""
    if column != "status":
        return style
    words = [part.lstrip("0123456789 ") for part in cell.split(", ")]
    tones = (tone for tone, statuses in _TONES.items() if all(word in statuses for word in words))
    return " ".join([style, *tones])


def _css(style: str) -> str:
    return f' class="{style}"' if style else ""
