"""Commands are named as the user can type them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pwm_torchrl import commands
from pwm_torchrl.cli.entry import COMMANDS

ROOT = Path(commands.__file__).parents[1]


@pytest.mark.parametrize("program", ["launch/train.py", "/somewhere/pytest", "-c", ""])
def test_in_a_checkout(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program])
    assert commands.typed("check_env") == "python launch/check_env.py"
    assert commands.named("train") == "launch/train.py"


def test_with_an_interpreter_that_the_shell_does_not_find(monkeypatch, tmp_path):
    """As after ``make run``: the command can be copied, and files say the same as ever."""
    program = tmp_path / ".venv" / "bin" / "python"
    other = tmp_path / "other" / "python"
    for file in (program, other):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", ["launch/submit.py"])
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.chdir(tmp_path)
    for path, expected in (
        (other.parent, ".venv/bin/python"),
        (tmp_path, ".venv/bin/python"),
        (program.parent, "python"),
    ):
        monkeypatch.setenv("PATH", str(path))
        assert commands.typed_here("train") == f"{expected} launch/train.py"
        assert commands.typed("train") == "python launch/train.py"
    monkeypatch.chdir(other.parent)
    monkeypatch.setenv("PATH", str(other.parent))
    assert commands.typed_here("train") == f"{program} launch/train.py"


def test_what_is_done_with_a_run_names_commands_that_are_there():
    for mode in ("online", "pretrain", "extract"):
        for script, words, meaning in commands.what_next(mode):
            assert (ROOT / "launch" / f"{script}.py").is_file()
            assert "RUN" in words
            assert meaning


def test_of_an_installed_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/pwm"])
    assert commands.typed("check_env") == commands.named("check_env") == "pwm check-env"
    assert commands.typed_here("check_env") == "pwm check-env"


def test_without_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "pwm_torchrl" / "commands.py"))
    assert commands.typed("train") == "pwm train"


def test_every_script_is_a_command_of_pwm():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    names = {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")}
    assert scripts == {"pwm": "pwm_torchrl.cli.entry:main"}
    assert set(COMMANDS) == names
