"""``launch/plan.py``: what it prints, and how it ends."""

from __future__ import annotations

import json

import pytest

from pwm_torchrl.launch.plan import main
from pwm_torchrl.launch.submit import main as submit
from pwm_torchrl.launch.train import main as train

SMALL = ["model=mlp", "size=tiny"]


def test_of_this_machine(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main([*SMALL, "memory.host_gb=500", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "host memory, predicted" in text
    assert "training.replay_storage=memory" in text
    saved = json.loads(file.read_text())
    assert saved["prediction"]["totals"]["host"] > saved["prediction"]["base"] > 0


def test_of_a_cluster(capsys):
    assert main([*SMALL, "env=dflex_ant", "cluster=l40s"]) == 0
    text = capsys.readouterr().out
    assert "unverified" in text
    assert "cluster=l40s" in text
    assert "training.replay_storage=device" in text


def test_impossible_names_the_smallest_budget(capsys):
    assert main([*SMALL, "memory.host_gb=0.01"]) == 2
    error = capsys.readouterr().err
    assert "The smallest budget that would work" in error
    least = error.split("memory.host_gb=")[1].split(")")[0]
    assert main([*SMALL, f"memory.host_gb={float(least) + 0.01}"]) == 0  # this process grows between the two


def test_fixed_is_warned_about(capsys):
    assert main([*SMALL, "memory=fixed", "memory.host_gb=0.01"]) == 0
    assert "warning: memory=fixed will not fit: host memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster=l40s", "cluster.gpu=l40"], "l40"),
        (["cluster=cpu", "cluster.host_gb=null"], "does not say how much host memory"),
        (["--json"], "--json needs the name of a file"),
        (["memory.margin=1"], "memory.margin"),
        (["memory=atuo"], "nearest"),
    ],
)
def test_bad_input(words, sentence, capsys):
    code = main([*SMALL, *words])
    shown = capsys.readouterr()
    if words[-1] == "cluster.gpu=l40":  # a type of its own
        assert code == 0
    else:
        assert code == 2
    assert sentence in shown.err + shown.out


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "launch/plan.py" in capsys.readouterr().out


@pytest.mark.parametrize("command", [submit, train])
def test_profiles_of_nodes_are_for_planning_only(command, capsys, tmp_path):
    assert command([*SMALL, "cluster=l40s", f"runs_dir={tmp_path}"]) == 2
    assert "cluster=l40s" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
