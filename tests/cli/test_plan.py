"""``launch/plan.py``: what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from forked_commands import run

from pwm_torchrl.cli.entry import run_command

main = partial(run_command, "plan")
submit = partial(run_command, "submit")
train = partial(run_command, "train")

pytest.importorskip("hydra")


SCRIPT = Path(__file__).parents[2] / "launch" / "plan.py"
SMALL = ["model=mlp", "algorithm.horizon=3"]
ELSEWHERE = [*SMALL, "env=dflex_ant"]


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    """An empty folder, in which a plan leaves nothing that was not asked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)


def test_of_this_machine(capsys):
    assert main([*SMALL, "device=cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("host memory, predicted\n")
    assert "training.replay_storage=memory" in text
    assert "next cheaper plan:" in text
    assert "unverified" not in text
    assert list(Path().iterdir()) == []


def test_of_a_cluster_from_anywhere(capsys):
    assert main([*ELSEWHERE, "cluster=l40s"]) == 0
    text = capsys.readouterr().out
    assert "unverified" in text
    assert "(cluster=l40s)" in text
    assert "training.replay_storage=device" in text
    assert max(map(len, text.splitlines())) <= 80  # without a terminal


@pytest.mark.parametrize(
    "word", ["cluster.partition=gpu", "cluster.mem_gib=8", "cluster.host_gib=64", "cluster.gpu=l40s"]
)
def test_of_this_machine_nothing_reads_what_is_for_slurm(word, capsys):
    assert main([*SMALL, "device=cpu", word]) == 2
    said = capsys.readouterr().err
    for part in (word, "this machine", "cluster=auto", "cluster=NAME", "leave it out"):
        assert part in said
    assert len(said.splitlines()) == 1


def test_as_a_file(capsys):
    assert main([*SMALL, "--json", "plan.json", "memory.host_gib=500"]) == 0
    assert "host memory, predicted" in capsys.readouterr().out
    saved = json.loads(Path("plan.json").read_text())
    assert saved["prediction"]["totals"]["host"] > saved["prediction"]["base"] > 0
    assert saved["choices"]["replay_storage"] == "memory"
    assert saved["automatic"]


def test_an_impossible_request_names_a_budget_that_works(capsys):
    words = [*SMALL, "device=cpu"]
    assert main([*words, "memory.host_gib=0.1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    (least,) = re.findall(r"The smallest budget that would work: .* \((memory\.host_gib=[0-9.]+)\)", shown.err)
    assert main([*words, least]) == 0
    assert "(memory.host_gib)" in capsys.readouterr().out


@pytest.mark.slow
def test_it_works_in_another_process_too():
    """Processes need not be of the same size: one is forked, one is new."""
    refused = run("plan", *SMALL, "device=cpu", "memory.host_gib=0.1")
    assert refused.returncode == 2
    (least,) = re.findall(r"\((memory\.host_gib=[0-9.]+)\)", refused.stderr)
    enough = run_script(*SMALL, "device=cpu", least)
    assert enough.returncode == 0, enough.stderr


def test_of_a_cluster_too_small(capsys):
    words = [*ELSEWHERE, "cluster=l40s", "cluster.host_gib=0.2"]
    assert main(words) == 2
    (least,) = re.findall(r"\((cluster\.host_gib=[0-9.]+)\)", capsys.readouterr().err)
    assert main([*words[:-1], least]) == 0


def test_fixed_is_warned_about(capsys):
    assert main([*SMALL, "memory=fixed", "memory.host_gib=0.01"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: memory=fixed will not fit: host memory: ")
    assert "DOES NOT FIT" in shown.out
    assert "choices, as configured (memory=fixed)" in shown.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster=l40s", "cluster.gpu=l41s"], "cluster.gpu=l41s: unknown GPU type 'l41s'; the nearest known: l40s"),
        (["cluster=cpu", "device=cuda"], "device=cuda needs a GPU, and cluster=cpu has none"),
        (["cluster=cpu", "cluster.host_gib=null"], "set cluster.host_gib"),
        (["cluster=l40"], "nearest: l40s"),
        (["--json"], "--json needs the name of a file"),
        (["--json", "missing/plan.json"], "--json missing/plan.json cannot be written: No such file or directory"),
        (["memory.margin=1"], "memory.margin=1"),
        (["memory=atuo"], "nearest: auto"),
        (["device=cuda:99"], "device='cuda:99' does not exist"),
        (["env=dflex_ant", "env.name=dflex_snake"], "dflex_snake"),
    ],
)
def test_bad_input_is_a_sentence(words, sentence, capsys):
    assert main([*ELSEWHERE, *words] if "cluster" in words[0] else [*SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert len(error.splitlines()) <= 3
    assert list(Path().iterdir()) == []


def test_help():
    done = run_script("--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert "usage: python launch/plan.py [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...] [--json FILE]" in words
    assert "python launch/plan.py model=flow_v3 size=48m env=dflex_ant cluster=l40s" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("command", [submit, train])
@pytest.mark.parametrize("words", [["cluster=l40s"], ["cluster=cpu"], ["cluster.kind=slurm"]])
def test_profiles_of_nodes_need_a_cluster(command, words, capsys, monkeypatch):
    monkeypatch.setattr("pwm_torchrl.cli.prepare.slurm_available", lambda: False)
    assert command([*SMALL, *words, "runs_dir=runs"]) == 2
    error = capsys.readouterr().err
    assert "describes SLURM nodes, but " in error
    assert len(error.splitlines()) == 1
    assert list(Path().iterdir()) == []
