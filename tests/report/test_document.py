"""The page: whole, loading nothing, with links to runs and rows that sort."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.report.document import Section, render
from pwm_torchrl.report.tables import Table

VOID = {"meta", "img"}


class Tree(HTMLParser):
    """Checks that tags close in order, and collects what a browser would load and show."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append((values.get("class", ""), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and (self.open[-1] in ("td", "th") or "th" in self.open):
            self.cells[-1] = (self.cells[-1][0], data)


def parse(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == []
    return tree


def test_the_page_is_whole_and_loads_nothing():
    table = Table(["run", "seed"], [["<script>alert(1)</script>", "3"]])
    page = render("A & B", "now", [Section("One", "text", table, {'a"b': b"\x89PNG"}, ["note <1>"]), Section("Two")])
    tree = parse(page)
    assert tree.sources == ["data:image/png;base64,iVBORw=="]
    assert page.count("<script") == 1  # which sorts
    assert "alert(1)</script>" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert {"A & B", "note <1>", "Two"} <= set(tree.text)
    assert ("right", "3") in tree.cells


def test_long_text_has_a_row_of_its_own():
    table = Table(["run", "seed", "error"], [["a", "0", "boom <x>"], ["b", "1", ""]], frozenset({"error"}))
    page = render("t", "s", [Section("One", table=table)])
    assert [cell for _, cell in parse(page).cells] == ["run", "seed", "a", "0", "error: boom <x>", "b", "1"]
    assert '<tr><td class="long" colspan="2">error: boom &lt;x&gt;</td></tr>\n</tbody>' in page  # moves with its row


def test_links_and_the_numbers_that_rows_are_sorted_by():
    links = {"files": [[("video", "a%20b/video.mp4"), ("W&B", "https://wandb.ai/x?a=1&b=2")], []]}
    table = Table(["run", "time"], [["a", "1 min 00 s"], ["b", "-"]], links=links, keys={"time": [60.0, None]})
    page = render("t", "s", [Section("One", table=table)])
    assert parse(page).sources == ["a%20b/video.mp4", "https://wandb.ai/x?a=1&b=2"]
    assert 'data-key="60.0">1 min 00 s<' in page
    assert 'data-key="">-<' in page
    assert [cell for _, cell in parse(page).cells][:3] == ["run", "time", "files"]


@pytest.mark.parametrize(
    ("status", "tone"),
    [
        ("finished", "words good"),
        ("3 finished", "words good"),
        ("2 finished, 1 failed", "words"),
        ("1 memory", "words bad"),
        ("1 running, 1 waiting", "words busy"),
        ("not started", "words"),
    ],
)
def test_a_status_has_the_colour_of_all_its_runs(status, tone):
    tree = parse(render("t", "s", [Section("One", table=Table(["status"], [[status]]))]))
    assert tree.cells[-1] == (tone, status)
