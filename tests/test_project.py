"""What the project says of itself outside of its code: names of extras, how to cite it, what CI runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import pwm_torchrl

ROOT = Path(pwm_torchrl.__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def texts():
    """Everything that a user may copy an extra's name from."""
    for folder, pattern in (("pwm_torchrl", "*.py"), ("launch", "*.py"), ("docs", "*.md"), ("examples", "*")):
        yield from (path for path in (ROOT / folder).rglob(pattern) if path.is_file() and path.suffix in (".py", ".md"))
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"))


def test_extras_that_texts_name_are_there(project):
    """Names that are filled in, ``pwm-torchrl[{extra}]``, are compared where they come from."""
    known = set(project["optional-dependencies"])
    assert not [name for name in known if "_" in name]
    named = {
        (str(path.relative_to(ROOT)), extra.strip())
        for path in texts()
        for found in re.findall(r"(?:pwm-torchrl|'\.)\[([^]{}]+)\]", path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert len(named) > 15
    assert not {(where, extra) for where, extra in named if extra not in known}


def test_simulators_of_tasks_are_extras(project):
    from pwm_torchrl.envs.tasks import task_set

    extras = {task.extra for task in task_set("mt80").tasks}
    assert extras == {"dm-control", "metaworld"}
    assert extras <= set(project["optional-dependencies"])


def test_the_citation_is_complete(project):
    """What the Citation File Format 1.2.0 requires, for this software and for the paper."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["title"].startswith("pwm_torchrl")
    assert cited["message"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    assert str(cited["version"]) == pwm_torchrl.__version__
    assert cited["license"] == project["license"]
    (paper,) = cited["references"]
    assert paper["type"] == "conference-paper"
    assert paper["title"] == "PWM: Policy Learning with Multi-Task World Models"
    assert [author["family-names"] for author in paper["authors"]] == ["Georgiev", "Giridhar", "Hansen", "Garg"]
    assert all(author["given-names"] for author in paper["authors"])
    assert paper["year"] == 2025
    assert "2407.02466" in paper["url"]
    assert [entry["value"] for entry in paper["identifiers"]] == ["arXiv:2407.02466"]
    assert {entry["type"] for entry in paper["identifiers"]} <= {"doi", "url", "swh", "other"}


def test_every_python_is_tested(project):
    """The workflow only says where; what runs is ``.ci/run``: in full with 3.11, the core with the others."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads the key "on" as true
    ran = {}
    for job in workflow["jobs"].values():
        checkout, run = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@")
        image = job["container"]
        for version in job.get("strategy", {}).get("matrix", {}).get("python", [""]):
            name = image.replace("${{ matrix.python }}", version)
            ran[re.fullmatch(r"python:(3\.\d+)-bookworm", name)[1]] = run["run"]
    assert ran == {"3.10": ".ci/run core", "3.11": ".ci/run", "3.12": ".ci/run core", "3.13": ".ci/run core"}
    python = "Programming Language :: Python :: "
    assert {python + version for version in ran} <= set(project["classifiers"])
    assert len([name for name in project["classifiers"] if name.startswith(python + "3.")]) == len(ran)


def test_ci_refuses_words_that_it_does_not_know():
    done = subprocess.run([ROOT / ".ci" / "run", "cor"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cor " in done.stdout
    assert "core" in done.stdout


@pytest.mark.parametrize(("lint", "tests", "pages"), [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 1)])
def test_ci_fails_where_any_part_does(lint, tests, pages, tmp_path):
    """Lint ends it at once; pages and tests both come to their end and are both shown."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    programs = {
        "make": f'case "$*" in *lint*) exit {lint};; esac; echo "7 passed in 1.0s"; exit {tests}',
        "python": f'case "$1" in -c) exit 0;; esac; sleep 0.2; echo "5 commands"; exit {pages}',
        "apt-get": "exit 0",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (lint == tests == pages == 0)
    assert ("[ci] Tests: 7 passed in 1.0s" in done.stdout) == (lint == 0)
    assert ("[ci] Pages: 5 commands" in done.stdout) == (lint == 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("active", [False, True])
def test_make_run_ends_with_how_to_activate(active, tmp_path):
    """Unless the environment is active already."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    for stamp in (".torch", ".run"):
        (tmp_path / stamp).touch()
    environment = {**os.environ, "PATH": os.pathsep.join([str(python.parent)] * active + [os.environ["PATH"]])}
    command = ["make", "--no-print-directory", "run", f"VENV={tmp_path}", "ARGS=seed=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "launch/submit.py seed=3" in lines
    assert lines[-1].endswith(f"source {tmp_path}/bin/activate") is not active


def test_the_quick_start_brings_what_follows_it():
    (line,) = (line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "-e '.[gym" in line)
    extras = set(line.partition("[")[2].partition("]")[0].split(","))
    assert extras == {"gym", "mujoco", "dm-control", "launch", "plot", "tensorboard", "video"}
