"""The scripts of ``launch/`` run by a Python that cannot run them: one sentence says what to type, exit code 2."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pwm_torchrl

ROOT = Path(pwm_torchrl.__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("[a-z]*.py"))
OLD = ("2.7", "3.6", "3.8", "3.9")


def run(script, *, cwd, python=(sys.executable, "-S")):
    """Runs a script; ``-S`` leaves the interpreter its standard library only."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([*python, str(script)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def sentence(done):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def clone(tmp_path):
    """A checkout's scripts, without a virtual environment yet."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone" / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "clone"


@pytest.fixture
def activate(clone):
    file = clone / ".venv" / "bin" / "activate"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_to_type(script, clone, activate):
    text = sentence(run(Path("launch", script), cwd=clone))
    assert text.endswith("source .venv/bin/activate\n")
    for library in ("torch", "torchrl", "hydra"):
        assert library in text
    assert sys.executable in text


def test_without_an_environment_beside_it(clone):
    text = sentence(run("launch/submit.py", cwd=clone))
    assert "`make run`" in text
    assert text.endswith("pip install -e '.[gym,launch]'\n")


def test_from_elsewhere(clone, activate, tmp_path):
    text = sentence(run(clone / "launch" / "plan.py", cwd=tmp_path))
    assert text.endswith("source clone/.venv/bin/activate\n")


def test_an_environment_that_is_active_and_not_complete(clone, activate):
    """As an interrupted ``make run`` leaves it; activating it again would not help."""
    code = "import sys; sys.path.insert(0, 'launch'); sys.prefix = '.venv'; import _start; print(_start.remedy())"
    command = [sys.executable, "-S", "-c", code]
    out = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout
    assert "`make run`" in out
    assert "activate" not in out


@pytest.mark.parametrize("version", OLD)
def test_old_pythons(version, clone, activate):
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"python{version} is not installed")
    text = sentence(run("launch/train.py", cwd=clone, python=[python]))
    assert version in text
    assert "3.10" in text
    assert text.endswith("source .venv/bin/activate\n")


@pytest.mark.parametrize("name", ["_start.py", "train.py"])
def test_old_pythons_can_read_them(name):
    """Where none is installed: words that Python 2.7 or 3.4 does not know would be a traceback before the sentence."""
    tree = ast.parse((ROOT / "launch" / name).read_text(encoding="ascii"), feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr))]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.returns or any(arg.annotation for arg in f.args.args)]


def test_a_folder_of_scripts_hides_no_library(tmp_path):
    """``data`` or ``status`` may be a library of the user; with ``-P`` the scripts find each other all the same."""
    code = "import sys; sys.argv = ['train.py']; sys.path.insert(0, HERE); import _start; _start.unfit = lambda: 'x';"
    code += "_start.start('train'); print(HERE in sys.path, sys.path[0])"
    code = code.replace("HERE", repr(str(ROOT / "launch")))
    out = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", str(ROOT)]
    if sys.version_info >= (3, 11):
        assert "torch" in sentence(run(ROOT / "launch" / "data.py", cwd=tmp_path, python=[sys.executable, "-S", "-P"]))
