"""``launch/evaluate.py``: what it prints and writes of one run and of several."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from training_stub import BUG, FAULT

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import save_config

main = partial(run_command, "evaluate")

pytestmark = pytest.mark.usefixtures("stub_training", "workdir")

LONG = "a_task_of_a_long_name_flow_v2_tiny_s{}_20261128-18484{}"


@functools.lru_cache
def composed() -> Config:
    return compose([])


def make_run(name: str = "run", seed: int = 0) -> str:
    path = Path(name)
    path.mkdir(parents=True)
    save_config(replace(composed(), seed=seed), path)
    return name


def test_one_run(capsys):
    assert main([make_run(), "--episodes", "4"]) == 0
    out = capsys.readouterr().out
    assert "run: return -150.0 ± 12.5 over 4 episodes\n" in out
    assert "95 % interval of the mean -162.5 to -137.5; best checkpoint, epoch 3; seed 7500\n" in out


def test_a_single_episode_has_no_interval(capsys):
    assert main([make_run(), "--episodes", "1", "--checkpoint", "12", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "over 1 episode\n  epoch 12; seed 4\n" in out
    assert "interval" not in out


def test_success_and_score(capsys, stub_training, monkeypatch):
    found = {"return_mean": 3.0, "return_std": 1.0, "episodes": 2, "returns": [2.0, 4.0], "seed": 1, "epoch": 2}
    found |= {"success_rate": 0.5, "score": 0.25}
    monkeypatch.setattr(stub_training, "evaluate_run", lambda *args, **kwargs: found)
    run = make_run()
    assert main([run]) == 0
    assert "run: return 3.0 ± 1.0, success 0.50, score 0.25 over 2 episodes" in capsys.readouterr().out
    assert main([run, make_run("other")]) == 0
    head, _, line, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "epoch", "return", "±", "std", "success", "score", "95", "%", "interval"]
    assert line.split()[:6] == ["run", "2", "3.0", "1.0", "0.50", "0.25"]


class TestSeveral:
    def test_a_line_each_in_the_order_given(self, capsys):
        assert main([make_run("b"), make_run("a"), "--episodes", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.endswith("-137.5")] == ["b", "a"]
        assert len({len(line) for line in lines[-4:]}) == 1

    def test_one_that_fails_does_not_hide_the_others(self, capsys):
        runs = [make_run("bug", BUG), make_run("fault", FAULT), make_run("good"), make_run("bad")]
        (Path("bad") / "config.yaml").write_text("seed: [")
        assert main([*runs, "nowhere"]) == console.BAD_INPUT
        out, err = capsys.readouterr()
        assert [line.split()[0] for line in out.splitlines() if "-150.0" in line] == ["good"]
        for name, reason in (
            ("bug", "KeyError"),
            ("fault", "reward is nan"),
            ("bad", "YAML"),
            ("nowhere", "no config"),
        ):
            assert any(name in line and reason in line for line in err.splitlines() if line.startswith("error: "))
        assert "Traceback" in err  # a defect is not hidden either
        assert main(["fault", "good"]) == console.FAILED

    def test_a_defect_of_a_single_run_is_raised(self):
        with pytest.raises(KeyError):
            main([make_run("bug", BUG)])

    def test_fits_the_terminal(self, capsys, monkeypatch):
        """Times at the end of the names go first; names that differ in nothing else keep them."""
        monkeypatch.setattr(console, "terminal_width", lambda: 80)
        runs = [make_run(LONG.format(seed, 0)) for seed in range(3)]
        assert main(runs) == 0
        lines = capsys.readouterr().out.splitlines()[-5:]
        assert max(map(len, lines)) <= 80
        assert [line.split()[0] for line in lines[2:]] == [f"a_task_of_a_long_name_flow_v2_tiny_s{n}" for n in range(3)]
        assert main([*runs, make_run(LONG.format(0, 7))]) == 0
        lines = capsys.readouterr().out.splitlines()[-4:]
        assert max(map(len, lines)) <= 80
        assert len({line.split()[0] for line in lines}) == 4
        assert all("…" in line for line in lines)


class TestJson:
    def test_to_stdout_and_nothing_else_there(self, capsys):
        assert main(["--json", make_run("good"), make_run("fault", FAULT), "--episodes", "2"]) == console.FAILED
        out, err = capsys.readouterr()
        good, fault = json.loads(out)
        assert good == {
            "run": "good", "checkpoint": "best", "epoch": 3, "return_mean": -150.0, "return_std": 12.5,
            "return_interval": [-162.5, -137.5], "episodes": 2, "returns": [-137.5, -162.5], "seed": 7500,
            "success_rate": None, "score": None, "video": None, "error": None,
        }  # fmt: skip
        assert good.keys() == fault.keys()
        assert (fault["run"], fault["return_mean"]) == ("fault", None)
        assert "reward is nan" in fault["error"]
        assert "chatter of a simulator" in err

    def test_to_a_file(self, capsys):
        assert main([make_run(), "--json", "results.json", "--checkpoint", "2"]) == 0
        (found,) = json.loads(Path("results.json").read_text())
        assert (found["checkpoint"], found["epoch"]) == ("2", 2)
        assert "return -150.0" in capsys.readouterr().out

    def test_what_json_does_not_know_is_null(self, capsys, stub_training, monkeypatch):
        nan = float("nan")
        found = {"return_mean": nan, "return_std": nan, "episodes": 1, "returns": [nan], "seed": 1, "epoch": 2}
        monkeypatch.setattr(stub_training, "evaluate_run", lambda *args, **kwargs: found)
        assert main([make_run(), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["returns"] == [None]


class TestVideo:
    def test_goes_into_the_run_or_where_it_is_told(self, capsys):
        assert main(["--video", make_run()]) == 0
        assert "video: run/evaluation.mp4" in capsys.readouterr().out
        assert Path("run/evaluation.mp4").read_bytes() == b"film"
        assert main(["run", "--video", "one.mp4"]) == 0
        assert Path("one.mp4").exists()
        assert main(["run", make_run("other"), "--video"]) == 0
        assert Path("other/evaluation.mp4").exists()

    def test_without_one_the_returns_are_told(self, capsys, stub_training, monkeypatch):
        def blind(*args, **kwargs):
            raise ConfigurationError("pendulum cannot be drawn here with MUJOCO_GL=egl")

        monkeypatch.setattr(stub_training, "film_run", blind)
        assert main([make_run(), "--video", "--json", "results.json"]) == console.BAD_INPUT
        out, err = capsys.readouterr()
        assert "return -150.0" in out
        assert err.startswith("error: run: no video: pendulum cannot be drawn here with MUJOCO_GL=egl")
        (found,) = json.loads(Path("results.json").read_text())
        assert (found["return_mean"], found["video"]) == (-150.0, None)
        assert "MUJOCO_GL" in found["error"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere is not a run directory"),
        ([], "RUN"),
        (["run", "--episodes", "0"], "--episodes=0"),
        (["run", "--episodes", "x"], "--episodes"),
        (["run", "--checkpoint", "newest"], "--checkpoint=newest"),
        (["run", "--checkpoint", "-3"], "--checkpoint"),
        (["run", "--video", "film.avi"], "--video=film.avi: the name of the file must end in .mp4"),
        (["run", "--json", "nowhere/a.json"], "--json=nowhere/a.json cannot be written"),
        (["run", "other", "--video", "film.mp4"], "--video=film.mp4 is one file for 2 runs"),
    ],
)
def test_bad_input(capsys, argv, words):
    assert main(argv) == console.BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert list(Path().iterdir()) == []


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for key in ("return_mean", "return_interval", "success_rate", "checkpoint", "error"):
        assert key in out
