"""Files that hosts read, and that nothing here runs: Read the Docs, GitHub's forms, container builders."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import pwm_torchrl

ROOT = Path(pwm_torchrl.__file__).parents[1]


@pytest.fixture(scope="module")
def extras() -> set[str]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with (ROOT / "pyproject.toml").open("rb") as file:
        return set(tomllib.load(file)["project"]["optional-dependencies"])


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def makefile_torch() -> str:
    """The torch that ``make`` installs, such as ``torch==2.13.0``."""
    (line,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return line


class TestReadTheDocs:
    def test_it_builds_what_make_docs_builds(self):
        config = read(".readthedocs.yaml")
        assert config["version"] == 2
        assert {"os", "tools", "jobs"} == set(config["build"])
        assert config["sphinx"]["fail_on_warning"] is True
        assert (ROOT / config["sphinx"]["configuration"]).is_file()
        (recipe,) = re.findall(r"-m sphinx (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        words = shlex.split(recipe)
        assert "-W" in words
        assert words[words.index("html") + 1] == str(Path(config["sphinx"]["configuration"]).parent)

    def test_it_installs_the_versions_of_development(self, extras):
        torch, package = (shlex.split(line) for line in read(".readthedocs.yaml")["build"]["jobs"]["install"])
        assert torch[-1] == makefile_torch()
        assert torch[torch.index("--index-url") + 1].endswith("/whl/cpu")
        assert (ROOT / package[package.index("-c") + 1]).is_file()
        found = re.fullmatch(r"\.\[(.+)\]", package[-1])
        assert "docs" in found[1].split(",")
        assert set(found[1].split(",")) <= extras

    def test_python_is_that_of_the_constraints(self):
        first = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]
        assert f"Python {read('.readthedocs.yaml')['build']['tools']['python']} " in first


def test_the_index_page_begins_with_figure_install_line_and_result():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    top, _, _ = text.partition("```{toctree}")
    figure = re.search(r"^!\[[^]]+\]\(([^)]+)\)$", top, re.MULTILINE)
    assert (ROOT / "docs" / figure[1]).is_file()
    places = [figure.start(), top.index("```\nmake run"), top.index("](results.md)"), top.index("](tutorial.md)")]
    assert places == sorted(places)


def test_results_on_the_index_page_are_those_of_the_table():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    results = (ROOT / "benchmarks" / "results" / "learning_dmc.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| ([a-z]+-[a-z]+) \| 1 \| \**(\d+)\** \|", results, re.MULTILINE))
    assert len(table) == 7
    assert dict(re.findall(r"([a-z]+-[a-z]+) (\d{3})[,.]", index)) == table
