"""What documentation shows runs: code of its pages and of docstrings; and the site builds without a warning."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pwm_torchrl

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A block of Python that is not marked as one that cannot run anywhere.
BLOCK = re.compile(r"^```python$(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *(`{3,}|~{3,})(.*)$")
#: Characters of code that fit into the site's column (docs/_static/site.css).
COLUMN = 96
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
#: A line that is not skipped for want of a file or a simulator.
EXAMPLE = re.compile(r"^ *>>> (?!.*\+SKIP)", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(pwm_torchrl.__path__, "pwm_torchrl.")]
    files = {name: ROOT.joinpath(*name.split(".")) for name in names}
    sources = {name: path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
               for name, path in files.items()}  # fmt: skip
    return [name for name, source in sources.items() if source.exists() and EXAMPLE.search(source.read_text("utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(page.relative_to(ROOT)) for page in WITH_CODE])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        code = "\n" * line + block.group(1).removeprefix("\n")
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings_run(name):
    if name.startswith("pwm_torchrl.envs.tasks.custom") or name.endswith("envs.makers"):
        pytest.importorskip("dm_control")
    module = importlib.import_module(name)
    failed: list[str] = []
    attempted = 0
    # No names of the module: what a reader pastes into a terminal imports what it needs.
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={}):
        result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=failed.append)
        attempted += result.attempted
    assert "".join(failed) == ""
    assert attempted > 0


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_code_fits_into_the_column(page):
    """Longer lines are cut off in the browser. Output of programs, ``text``, is as long as it is."""
    fence, too_long = "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = FENCE.match(line)
        if found and not fence:
            fence, language = found.groups()
        elif found and found[1].startswith(fence):
            fence = ""
        elif fence and language != "text" and len(line) > COLUMN:
            too_long.append(f"{number}: {line}")
    assert too_long == []


def test_links_of_the_readme_lead_to_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [each for each in re.findall(r"\]\(([^)\s]+)\)", text) if not each.startswith(("http", "#"))]
    assert "docs/results.md" in targets
    assert [each for each in targets if not (ROOT / each.partition("#")[0]).exists()] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("sphinx")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "site")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "PWMActorLoss" in (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    page = tmp_path / "site" / "reference" / "generated" / "pwm_torchrl.objectives.PWMActorLoss.html"
    text = page.read_text(encoding="utf-8")
    signature, _, rest = re.sub(r"<[^>]+>", "", text.partition("<dt ")[2]).partition("[source]")
    assert "horizon: int = 16" in signature, "its own signature, with types, and not that of its metaclass"
    assert "actor_network: TensorDictModuleBase" in signature, "types by their last names"
    assert r"\gamma^H V(z_H)" in rest
