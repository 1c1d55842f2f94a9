"""What the project says of itself outside of its code: names of extras, how to cite it, what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
