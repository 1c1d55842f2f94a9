"""Commands are named as the user can type them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pwm_torchrl import commands

ROOT = Path(commands.__file__).parents[1]


@pytest.mark.parametrize("program", ["launch/train.py", "/somewhere/pytest", "-c", ""])
def test_in_a_checkout(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program])
    assert commands.typed("check_env") == "python launch/check_env.py"
    assert commands.named("train") == "launch/train.py"


def test_of_an_installed_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/pwm-plan"])
    assert commands.typed("check_env") == commands.named("check_env") == "pwm-check-env"


def test_without_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "pwm_torchrl" / "commands.py"))
    assert commands.typed("train") == "pwm-train"


def test_every_script_has_a_console_command():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    names = {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")}
    assert scripts == {f"pwm-{n.replace('_', '-')}": f"pwm_torchrl.launch.entry:{n}" for n in names}
    from pwm_torchrl.launch import entry

    assert set(entry.__all__) == names
