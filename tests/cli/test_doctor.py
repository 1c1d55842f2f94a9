"""``launch/doctor.py``: options, lines and exit codes."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from slurm_texts import SITE

from pwm_torchrl.cli import doctor
from pwm_torchrl.cli.doctor import OK, PROBLEM, WARNING, Finding
from pwm_torchrl.cli.entry import run_command

main = partial(run_command, "doctor")

SCRIPT = Path(__file__).parents[2] / "launch" / "doctor.py"
CHECKS = ("check_packages", "check_gpu", "check_rendering", "check_disk", "check_slurm", "check_wandb")


@pytest.fixture
def healthy(monkeypatch):
    """Every check finds everything in order; returns what each was told."""
    told = {}

    def fine(name):
        def check(*args, **options):
            told[name] = options
            return [Finding(OK, name, "fine")]

        return check

    monkeypatch.setattr(doctor, "slurm_available", lambda: False)
    for name in CHECKS:
        monkeypatch.setattr(doctor, name, fine(name))
    return told


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "slurm_available", lambda: True)
    monkeypatch.setattr(doctor, "site", lambda: SITE)
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    return tmp_path / "cluster"


def test_all_is_well(healthy, capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("ok       check_") and line.endswith("fine") for line in lines)
    assert healthy["check_disk"] == healthy["check_gpu"] == {"elsewhere": False}


def test_jobs_of_slurm_run_elsewhere(healthy, capsys):
    assert main(["cluster=l40s"]) == 0
    assert healthy["check_disk"] == {"elsewhere": True}
    assert healthy["check_slurm"] == {"available": False}


def test_a_warning_is_no_failure(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_disk", lambda *args, **options: [Finding(WARNING, "disk", "hm")])
    assert main([]) == 0
    assert "warning  disk       hm" in capsys.readouterr().out


def test_a_problem_is(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_disk", lambda *args, **options: [Finding(PROBLEM, "disk", "full")])
    assert main([]) == 1
    shown = capsys.readouterr()
    assert "problem  disk       full" in shown.out
    assert shown.out.splitlines()[-1].startswith("ok")  # the rest is looked at all the same
    assert shown.err == "error: 1 problem, see above\n"


def test_a_draft_is_written_once(slurm, capsys):
    assert main(["--draft", "mine", "cluster.partition=gpu"]) == 0
    shown = capsys.readouterr().out
    text = (slurm / "mine.yaml").read_text()
    assert text in shown
    assert f"written: {slurm / 'mine.yaml'}" in shown
    assert "partition: gpu\n" in text
    assert main(["--draft", "mine"]) == 2
    assert "--force writes over it" in capsys.readouterr().err
    assert (slurm / "mine.yaml").read_text() == text
    assert main(["--draft", "mine", "--force"]) == 0
    assert "partition: main\n" in (slurm / "mine.yaml").read_text()


def test_no_draft_without_slurm(slurm, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "slurm_available", lambda: False)
    assert main(["--draft", "mine"]) == 2
    assert "belongs to no cluster" in capsys.readouterr().err
    assert not slurm.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--draft"], "--draft needs a name"),
        (["--force"], "give --draft NAME too"),
        (["--draft", "l40s"], "such as my_l40s"),
        (["--draft", "mine", "cluster.partition=nope"], "cluster.partition=nope does not exist"),
        (["cluster=l40"], "nearest: l40s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_a_sentence(slurm, words, sentence, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert not slurm.exists()


def test_help():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "usage: python launch/doctor.py" in done.stdout
