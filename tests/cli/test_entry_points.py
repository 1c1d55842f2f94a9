"""The scripts of ``launch/``: help, errors without tracebacks, results, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from training_stub import BAD_INPUT, BUG, FAULT, NO_DISK, NO_MEMORY

from pwm_torchrl.choices import group_choices
from pwm_torchrl.cli import console, prepare
from pwm_torchrl.cli.entry import run_command

SCRIPTS = Path(__file__).parents[2] / "launch"
pytestmark = pytest.mark.usefixtures("stub_training", "workdir")


def run_script(name: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPTS / name), *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["submit.py", "train.py", "plan.py", "check_env.py"])
def test_help_explains_itself(name):
    done = run_script(name, "--help")
    assert done.returncode == 0
    for group, choices in group_choices().items():
        assert group in done.stdout
        assert all(choice in done.stdout for choice in choices)
    assert done.stdout.count(f"python launch/{name}") >= 6
    assert "Powered by Hydra" not in done.stdout


@pytest.mark.parametrize("name", ["evaluate.py", "report.py"])
def test_help_of_the_tools(name):
    done = run_script(name, "--help")
    assert done.returncode == 0
    assert f"python launch/{name}" in done.stdout


@pytest.mark.parametrize("name", ["submit.py", "train.py", "plan.py", "check_env.py"])
def test_a_typo_is_a_few_lines_without_traceback(name):
    done = run_script(name, "model=flwo_v2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model=flwo_v2")
    assert "nearest: flow_v2" in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert list(Path().iterdir()) == []


def test_train_runs_here_and_ends_with_the_summary(capsys):
    assert run_command("train", ["run_dir=run", "training.epochs=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run: {Path('run').absolute()}"
    assert lines[-1] == (
        "pendulum residual tiny seed 0: finished · final return -120.0 (peak -100.0, random -1200.0) · epochs 2/2 "
        f"· 1 s · {Path('run').absolute()}"
    )
    assert run_command("train", ["run_dir=run", "training.epochs=2"]) == 2
    assert "finished run" in capsys.readouterr().err


def test_train_errors_of_ours_are_sentences(capsys):
    assert run_command("train", ["run_dir=a", f"seed={BAD_INPUT}"]) == 2
    assert run_command("train", ["run_dir=b", f"seed={FAULT}"]) == 1
    err = capsys.readouterr().err
    assert "error: algorithm.horizon=9 is longer than an episode" in err
    assert "error: pendulum, seed 3: reward is nan" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("seed", "code", "sentence", "remedy"),
    [
        (NO_MEMORY, 75, "the critic update does not fit", "with more memory (or a larger memory.host_gib, if that is"),
        (NO_DISK, 74, "could not write segment_000001.bin", "after freeing disk space"),
    ],
)
def test_train_without_memory_or_disk_says_how_to_resume(capsys, seed, code, sentence, remedy):
    assert run_command("train", ["run_dir=run", f"seed={seed}"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"error: {sentence}", f"run directory: {Path('run').absolute()}"]
    assert lines[2].startswith(f"to resume {remedy}")
    assert lines[2].endswith(f": python launch/train.py seed={seed} run_dir={Path('run').absolute()}")
    assert len(lines) == 3


@pytest.mark.parametrize("name", ["submit.py", "train.py"])
def test_help_tells_the_exit_codes(name):
    text = run_script(name, "--help").stdout
    for status, code in console.EXIT_CODES.items():
        assert f"{code} {status}" in text
    assert f"{console.BAD_INPUT} bad input" in text


def test_train_shows_a_bug():
    with pytest.raises(KeyError):
        run_command("train", ["run_dir=run", f"seed={BUG}"])


def test_train_stopped_says_how_to_resume(capsys, stub_training, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stub_training, "train", interrupted)
    Path("stopped_robot.py").write_text(
        "from torchrl.envs import GymEnv\n\n\ndef make():\n    return GymEnv('Pendulum-v1')\n"
    )
    assert run_command("train", ["model=mlp", "env._target_=stopped_robot.make"]) == 130
    err = capsys.readouterr().err
    assert "python launch/train.py model=mlp env._target_=stopped_robot.make run_dir=" in err


def test_check_env_prints_the_report(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "report_env", lambda env, num_envs: f"{env['id']} x {num_envs}")
    assert run_command("check_env", ["env=gymnasium", "env.id=Walker2d-v5"]) == 0
    assert capsys.readouterr().out == "Walker2d-v5 x 8\nok: a run can use this environment\n"
    assert list(Path().iterdir()) == []


def test_what_to_type_next_with_a_world_model():
    lines = console.next_lines("pretrain", Path("runs/a b").absolute(), "data/my store").splitlines()
    words = "world_model='runs/a b' data.path='data/my store'"
    assert lines[1] == f"  python launch/submit.py experiment=extract task=all {words}"
    assert lines[2] == "  python launch/world_model.py show 'runs/a b'"


def test_without_submitit_a_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_command("submit", ["run_dir=run"]) == 2
    assert "pip install 'pwm-torchrl[launch]'" in capsys.readouterr().err


def test_result_without_returns_is_still_a_line(capsys, stub_training, monkeypatch):
    summary = {"status": "failed", "model": "mlp", "final_return": None}
    monkeypatch.setattr(stub_training, "train", lambda *a, **k: json.loads(json.dumps(summary)))
    assert run_command("train", ["run_dir=run"]) == 1
    assert "failed" in capsys.readouterr().out
