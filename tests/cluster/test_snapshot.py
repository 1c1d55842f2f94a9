"""Copies of the code that jobs run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pwm_torchrl.cluster import snapshot as module
from pwm_torchrl.cluster.snapshot import snapshot, targets_of
from pwm_torchrl.errors import ConfigurationError


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's folder on the path, with a package and a helper beside it."""
    folder = tmp_path / "project"
    (folder / "my_pkg").mkdir(parents=True)
    (folder / "my_pkg" / "__init__.py").write_text("from helper import WORD\ndef make_env(): return WORD\n")
    (folder / "helper.py").write_text("WORD = 'first'\n")
    (folder / "data.bin").write_bytes(bytes(1000))
    (folder / "runs").mkdir()
    (folder / "runs" / "old.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("my_pkg", None)


def said_by(copies: list[Path], statement: str, cwd: Path) -> str:
    environ = {"PYTHONPATH": ":".join(map(str, copies)), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, cwd=cwd, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_edit_changes_no_copy(user, tmp_path):
    copies = snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])
    (user / "helper.py").write_text("WORD = 'second'\n")
    assert said_by(copies, "import my_pkg; print(my_pkg.make_env())", tmp_path) == "first"
    later = snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])
    assert said_by(later, "import my_pkg; print(my_pkg.make_env())", tmp_path) == "second"
    assert later[0] == copies[0], "this package did not change"
    assert later[1] != copies[1]


def test_the_job_imports_this_package_from_its_copy(tmp_path):
    (copy,) = snapshot(tmp_path)
    place = said_by([copy], "import pwm_torchrl; print(pwm_torchrl.__file__)", tmp_path)
    assert Path(place).is_relative_to(copy)
    assert (copy / "configs" / "config.yaml").is_file()


def test_equal_code_is_copied_once(user, tmp_path):
    first = snapshot(tmp_path / "all_runs", ["my_pkg.make_env", "my_pkg.other"])
    assert snapshot(tmp_path / "all_runs", ["my_pkg.make_env"]) == first
    assert len(list((tmp_path / "all_runs" / module.FOLDER).iterdir())) == 2


def test_only_code_is_copied(user, tmp_path):
    copy = snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])[1]
    names = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert names == {"my_pkg/__init__.py", "helper.py"}


def test_git_tells_what_belongs_to_it(user, tmp_path):
    """Uncommitted and untracked files too, ignored ones not."""
    (user / ".gitignore").write_text("secret.py\nruns/\n")
    (user / "secret.py").touch()
    subprocess.run(["git", "init", "-q", str(user)], check=True)
    copy = snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])[1]
    assert {file.name for file in copy.rglob("*.py")} == {"__init__.py", "helper.py"}


def test_installed_and_own_names_need_no_copy(tmp_path):
    assert (
        len(snapshot(tmp_path, ["pwm_torchrl.envs.make_gymnasium_env", "torch.nn.Linear", "json.loads", "no.such"]))
        == 1
    )


def test_a_folder_of_data_is_refused(user, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_COPY", 10)
    with pytest.raises(ConfigurationError, match="import your module from a folder that holds code only"):
        snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])


def test_targets():
    tree = {"env": {"_target_": "a.b", "x": [{"_target_": "c.d"}]}, "seed": 0, "other": {"_target_": None}}
    assert list(targets_of(tree)) == ["a.b", "c.d"]


def test_a_job_from_a_checkout_names_its_scripts(tmp_path):
    (copy,) = snapshot(tmp_path)
    assert said_by([copy], "from pwm_torchrl.commands import typed; print(typed('report'))", tmp_path) == (
        "python launch/report.py"
    )
