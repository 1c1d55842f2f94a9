"""``launch/data.py``: import, inspect and generate from the command line."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from pwm_torchrl.cli import console
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.data.episodes import EpisodeStore

main = partial(run_command, "data")

SCRIPT = Path(__file__).parents[2] / "launch" / "data.py"


def make_source(folder, early=0):
    """Two chunks of pendulum and cartpole: x' = 0.9 x + u / 2, the reward is -x² of the state reached."""
    folder.mkdir()
    rng = np.random.RandomState(0)
    for number in range(2):
        obs, action = torch.zeros(8, 61, 5), torch.full((8, 61, 1), torch.nan)
        action[:, 1:] = torch.from_numpy(rng.uniform(-1, 1, (8, 60, 1)))
        task = torch.arange(8) % 2
        state = torch.from_numpy(rng.randn(8, 5)).float()
        for step in range(61):
            state = 0.9 * state + (0.5 * action[:, step] if step else 0)
            obs[:, step] = state
        obs[task == 0, :, 3:] = 0
        reward = -(obs[..., :2] ** 2).sum(-1)
        reward[:, 0] = torch.nan
        action[:, 1 : 61 - early] = action[:, 1 + early :].clone()
        label = task.int().unsqueeze(1).repeat(1, 61)
        chunk = TensorDict(obs=obs, action=action, reward=reward, task=label, batch_size=[8, 61])
        torch.save(chunk, folder / f"chunk_{number}.pt")
    return folder


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


TASKS = ["--tasks", "pendulum-swingup,cartpole-swingup"]


def run(capsys, *words):
    code = main([str(word) for word in words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_import_then_inspect(tmp_path, source, capsys):
    code, out, _ = run(capsys, "import", source, tmp_path / "store", *TASKS)
    assert code == console.OK
    lines = out.splitlines()
    assert lines[0].split() == ["task", "O", "A", "episodes", "transitions", "length", "mean", "return"]
    assert lines[2].split()[:6] == ["pendulum-swingup", "3", "1", "8", "480", "60"]
    assert lines[-1] == f"{tmp_path / 'store'}: 16 episodes, 960 transitions"
    assert EpisodeStore.open(tmp_path / "store").num_episodes == 16
    code, out, _ = run(capsys, "inspect", tmp_path / "store")
    assert code == console.OK
    row = out.splitlines()[2].split()
    assert (row[0], row[-4:]) == ("pendulum-swingup", ["3/3", "1/1", "aligned", "aligned"])


def test_inspect_a_source_with_shifted_actions(tmp_path, capsys):
    source = make_source(tmp_path / "source", early=1)
    code, out, _ = run(capsys, "inspect", source, *TASKS)
    assert code == console.FAILED
    assert "pendulum-swingup: actions are stored one row too early" in out
    code, _, err = run(capsys, "inspect", source)
    assert code == console.BAD_INPUT
    assert "--tasks" in err


def test_bad_files_end_with_a_sentence_and_can_be_left_out(tmp_path, source, capsys):
    (source / "chunk_1.pt").write_bytes(b"nothing")
    code, _, err = run(capsys, "import", source, tmp_path / "store", *TASKS)
    assert code == console.BAD_INPUT
    assert "error: 1 of 2 sources cannot be imported" in err.splitlines()[-1]
    code, out, _ = run(capsys, "import", source, tmp_path / "store", *TASKS, "--keep-good")
    assert code == console.OK
    assert "left out: chunk_1.pt: " in out
    code, _, err = run(capsys, "inspect", source, *TASKS)
    assert code == console.FAILED
    assert "error: chunk_1.pt: " in err


def test_tasks_without_data_are_named(tmp_path, source, capsys):
    tasks = "pendulum-swingup,cartpole-swingup,cartpole-balance"
    code, out, _ = run(capsys, "import", source, tmp_path / "store", "--tasks", tasks)
    assert code == console.OK
    assert "no data: cartpole-balance" in out.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imprt"], "'imprt' is not a command of launch/data.py; choose one of import, inspect, generate"),
        (["import", "a", "b"], "--tasks"),
        (["import", "nowhere", "b", "--tasks", "mt30"], "there is no folder or file nowhere"),
        (["import", "nowhere", "b", "--tasks", "mt31"], "did you mean mt30"),
        (["inspect", "nowhere", "--tasks", "mt30"], "there is no folder or file nowhere"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == console.BAD_INPUT
    assert not out
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_has_its_exit_code(capsys, source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pwm_torchrl.data.episodes.writer.write_all", full)
    code, _, err = run(capsys, "import", source, tmp_path / "store", *TASKS)
    assert code == console.STORAGE
    assert "then run the same import again" in err


def test_the_script_explains_itself():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {command} " in done.stdout for command in ("import", "inspect", "generate"))
    assert max(map(len, done.stdout.splitlines())) <= 120
