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
    table: dict[str, str] = {}
    for task, value in re.findall(r"^\| ([a-z]+-[a-z]+) \| \d+ \| \**(\d+)[ |*(]", results, re.MULTILINE):
        table.setdefault(task, value)  # the present settings come first
    assert len(table) == 7
    assert dict(re.findall(r"([a-z]+-[a-z]+) (\d+)[,.]", index)) == table


FORMS = ("bug_report", "feature_request", "question")
#: GitHub's schema of issue forms: what each kind of element must have beside its type.
ELEMENTS = {"markdown": {"value"}, "textarea": {"label"}, "input": {"label"}, "dropdown": {"label", "options"}}


class TestIssueForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_github_accepts_it(self, name):
        """What https://docs.github.com/communities (syntax for issue forms) requires; others are silently not shown."""
        form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels", "title"}
        assert any(element["type"] != "markdown" for element in form["body"])
        ids = [element["id"] for element in form["body"] if element["type"] != "markdown"]
        labels = [element["attributes"]["label"] for element in form["body"] if element["type"] != "markdown"]
        assert len(set(ids)) == len(ids)
        assert len(set(labels)) == len(labels)
        assert all(re.fullmatch(r"[\w-]+", each) for each in ids)
        for element in form["body"]:
            assert set(element) <= {"type", "id", "attributes", "validations"}
            assert ELEMENTS[element["type"]] <= set(element["attributes"])
            assert set(element.get("validations", {})) <= {"required"}

    def test_all_of_them_are_tried(self):
        assert {path.stem for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()} == {*FORMS, "config"}

    def test_the_chooser_names_addresses(self):
        config = read(".github/ISSUE_TEMPLATE/config.yml")
        assert set(config) == {"blank_issues_enabled", "contact_links"}
        for link in config["contact_links"]:
            assert set(link) == {"name", "url", "about"}
            assert link["url"].startswith("https://")

    def test_a_bug_report_asks_for_what_exists(self):
        """The command, the keys of summary.json and the line that prints versions."""
        from pwm_torchrl.cli.entry import COMMANDS
        from pwm_torchrl.run.directory import versions

        text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")
        commands = set(re.findall(r"\bpwm ([a-z]+)", text))
        assert "doctor" in commands
        assert commands <= set(COMMANDS)
        (line,) = re.findall(r'python -c "([^"]+)"', text)
        assert line == f"from {versions.__module__} import {versions.__name__}; print(versions())"
        asked = {"versions", "hardware", "git_commit"}
        summary = (ROOT / "pwm_torchrl" / "run" / "summary.py").read_text(encoding="utf-8")
        assert all(key in text and f'"{key}"' in summary for key in asked)


def test_what_the_forms_point_to_is_there():
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md"):
        assert (ROOT / name).is_file()
    covenant = (ROOT / "CODE_OF_CONDUCT.md").read_text(encoding="utf-8")
    assert "https://www.contributor-covenant.org/version/2/1/" in covenant
    assert "make check" in (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: their names and the rest, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def arguments() -> dict[str, str]:
    """Defaults of the build arguments."""
    pairs = (rest.partition("=") for name, rest in instructions() if name == "ARG")
    return {key: value.strip('"') for key, _, value in pairs}


class TestContainer:
    def test_every_stage_begins_with_a_pinned_python_that_the_constraints_are_for(self):
        bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
        assert len(set(bases)) == 1
        version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", bases[0])[1]
        assert f"Python {version} " in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]

    def test_versions_are_those_of_development(self, extras):
        given = arguments()
        assert f"torch=={given['TORCH']}" == makefile_torch()
        assert given["TORCH_INDEX"].endswith("/whl/cpu")
        assert set(given["EXTRAS"].split(",")) <= extras
        installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
        assert all("--no-cache-dir" in rest for rest in installs)
        assert "-c constraints.txt" in installs[-1]

    def test_the_system_packages_leave_no_lists(self):
        runs = [rest for name, rest in instructions() if name == "RUN" and "apt-get" in rest]
        assert runs
        for rest in runs:
            assert "--no-install-recommends" in rest
            assert rest.endswith("rm -rf /var/lib/apt/lists/*")

    def test_it_runs_pwm_as_a_user_without_rights(self):
        last = [name for name, _ in instructions()].index("FROM", 1)
        final = dict(instructions()[last:])
        assert final["USER"] not in ("root", "0")
        assert final["ENTRYPOINT"] == '["pwm"]'

    def test_the_commit_is_where_a_run_looks_for_it(self):
        from pwm_torchrl.run.directory import COMMIT_FILE

        (write,) = [rest for name, rest in instructions() if name == "RUN" and "$COMMIT" in rest]
        assert 'get_path("purelib")' in write
        assert f"/{COMMIT_FILE}" in write

    def test_what_is_copied_is_there_and_is_all_that_the_builder_gets(self):
        copied = {
            source.rstrip("/")
            for name, rest in instructions()
            if name == "COPY" and "--from" not in rest
            for source in rest.split()[:-1]
        }
        assert "." not in copied
        assert all((ROOT / source).exists() for source in copied)
        ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        rules = [line for line in ignore if line and not line.startswith("#")]
        assert rules[0] == "*"
        assert {line.removeprefix("!") for line in rules if line.startswith("!")} == copied

    def test_the_wheel_can_be_built_from_what_is_copied(self):
        """Its force-included folders, packages, readme and licence."""
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
        needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]}
        needed |= set(project["project"]["license-files"])
        copied = " ".join(rest for name, rest in instructions() if name == "COPY").split()
        assert needed <= set(copied)
