"""The console commands of an installed package."""

from __future__ import annotations

import contextlib
import sys

import pytest

from pwm_torchrl.cli import entry


@pytest.mark.parametrize("name", entry.__all__)
def test_each_is_its_scripts_main_and_named_by_itself(name, capsys, monkeypatch):
    command = f"pwm-{name.replace('_', '-')}"
    monkeypatch.setattr(sys, "argv", [f"/venv/bin/{command}", "--help"])
    with contextlib.suppress(SystemExit):  # argparse ends so
        assert getattr(entry, name)() == 0
    out = capsys.readouterr().out
    assert f"usage: {command}" in out
    assert "launch/" not in out


def test_without_the_libraries_of_the_command_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "pwm_torchrl.cli.train")
    monkeypatch.delitem(sys.modules, "pwm_torchrl.cli.compose")
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert entry.run("train") == 2
    assert capsys.readouterr().err == "error: hydra is not installed; pip install 'pwm-torchrl[launch]'\n"


def test_other_missing_modules_are_bugs():
    with pytest.raises(ModuleNotFoundError):
        entry.run("nothing")
