"""Copies of the code that jobs run."""

from __future__ import annotations

import importlib
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
    for name in ("my_pkg", "helper", "lab_tools"):
        sys.modules.pop(name, None)


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
    assert len(list((tmp_path / "all_runs" / module.FOLDER).glob("[!.]*"))) == 2


def copied(user, runs_dir):
    """Names of the files in the copy of the user's folder."""
    copy = snapshot(runs_dir, ["my_pkg.make_env"])[1]
    return {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}


CODE = {"my_pkg/__init__.py", "helper.py", "data.bin", "runs/old.py"}


def write(folder, *names, content=b"x"):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.mark.parametrize("git", [False, True])
def test_what_is_imported_is_copied_whatever_git_thinks_of_it(user, tmp_path, git):
    """Generated and compiled modules that git ignores, what a package reads beside its modules, a submodule."""
    needed = ("my_pkg/_version.py", "my_pkg/fast.cpython-311.so", "my_pkg/assets/arm.stl", "my_pkg/robot.urdf",
              "my_pkg/policy.onnx", "my_pkg/py.typed", "my_pkg/LICENSE", "assets/table.obj",
              "sub/inner/__init__.py")  # fmt: skip
    write(user, *needed)
    if git:
        (user / ".gitignore").write_text("_version.py\n*.so\n*.stl\nruns/\n")
        subprocess.run(["git", "init", "-q", str(user)], check=True)
        subprocess.run(["git", "init", "-q", str(user / "sub")], check=True)
    assert copied(user, tmp_path / "all_runs") == CODE | set(needed)


def test_output_and_environments_are_not(user, tmp_path):
    write(user, "venv/pyvenv.cfg", "venv/lib/a.py", "conda/conda-meta/history", "conda/a.py", "wandb/run.json",
          "outputs/2026/.hydra/config.yaml", "outputs/2026/a.py", "my_run/config.yaml", "my_run/attempts/000001.json",
          "my_run/metrics.csv", "train.log", "slurm-7.out", "a.ipynb", ".git/config", "my_pkg/__pycache__/a.pyc",
          "node_modules/a.json")  # fmt: skip
    assert copied(user, tmp_path / "all_runs") == CODE


def test_copies_hold_no_earlier_copies(user, tmp_path):
    """Runs in the user's own folder, which git does not ignore: the same code is copied once, whatever they write."""
    (user / "runs" / "old.py").unlink()
    runs = user / "runs"
    first = snapshot(runs, ["my_pkg.make_env"])
    for number in range(3):
        write(runs / f"run_{number}", "config.yaml", "summary.json", "notes.txt")
        assert snapshot(runs, ["my_pkg.make_env"]) == first
    # Also where the runs are not those that it is submitted to.
    assert copied(user, tmp_path / "elsewhere") == CODE - {"runs/old.py"}


def test_copies_share_what_is_equal(user, tmp_path):
    runs = tmp_path / "all_runs"
    first = snapshot(runs, ["my_pkg.make_env"])[1]
    (user / "helper.py").write_text("WORD = 'second'\n")
    second = snapshot(runs, ["my_pkg.make_env"])[1]
    assert (first / "data.bin").samefile(second / "data.bin")
    assert not (first / "helper.py").samefile(second / "helper.py")
    assert (first / "helper.py").read_text() == "WORD = 'first'\n"


SECRETS = (".env", ".env.local", "prod.env", "server.pem", "id_rsa", "my_pkg/credentials.json", "aws-secrets.yaml",
           "api_key.txt", "_netrc")  # fmt: skip


def test_secrets_stay_and_are_named(user, tmp_path, capsys):
    write(user, *SECRETS, "my_pkg/secret_sauce.py", "my_pkg/tokenizer.json", content=b"KEY")
    assert copied(user, tmp_path / "all_runs") == CODE | {"my_pkg/secret_sauce.py", "my_pkg/tokenizer.json"}
    said = capsys.readouterr().err
    assert "secret" in said
    assert "my_pkg/credentials.json" in said or "more" in said
    assert not any(b"KEY" in file.read_bytes() for name in SECRETS for file in tmp_path.glob(f"all_runs/**/{name}"))


def test_large_files_are_data_and_are_named(user, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LARGEST_FILE", 5000)
    write(user, "my_pkg/weights.pt", content=bytes(6000))
    assert copied(user, tmp_path / "all_runs") == CODE
    assert "my_pkg/weights.pt (6,000 bytes)" in capsys.readouterr().err


def test_a_linked_package_is_followed_and_a_circle_ends(user, tmp_path):
    write(tmp_path / "lib" / "linked", "__init__.py")
    (user / "linked").symlink_to(tmp_path / "lib" / "linked")
    (user / "my_pkg" / "circle").symlink_to(user)
    assert copied(user, tmp_path / "all_runs") == CODE | {"linked/__init__.py"}


def test_what_a_module_imports_from_elsewhere_is_copied_too(user, tmp_path, monkeypatch):
    write(tmp_path / "lib", "lab_tools.py", content=b"WORD = 'tools'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (user / "my_pkg" / "__init__.py").write_text("from lab_tools import WORD\ndef make_env(): return WORD\n")
    importlib.import_module("my_pkg").lab_tools = importlib.import_module("lab_tools")
    copies = snapshot(tmp_path / "all_runs", ["my_pkg.make_env"])
    (tmp_path / "lib" / "lab_tools.py").unlink()
    assert said_by(copies, "import my_pkg; print(my_pkg.make_env())", tmp_path) == "tools"


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
