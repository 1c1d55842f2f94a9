"""The table and the curves, of runs in every state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.report import find_runs, main, read_run, table
from pwm_torchrl.launch.run_dir import prepare_run_dir

pytestmark = pytest.mark.usefixtures("workdir")

METRICS = "epoch,env_steps,train/return,eval/return_mean,eval/return_std\n"


def make_run(name: str, *words: str, rows: str | None = None, **summary) -> Path:
    path = prepare_run_dir(compose([f"run_dir=runs/{name}", *words])).path
    if rows is not None:
        (path / "metrics.csv").write_text(METRICS + rows)
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def runs() -> None:
    rows = "1,128,-1300,,\n2,256,-1200,-1100,50\n3,384,-900,-400,20\n4,512,-800,-500,30\n"
    done = {"status": "finished", "epochs_done": 4, "epochs_planned": 4, "peak_return": -400.0}
    make_run("finished", "training.epochs=4", rows=rows, final_return=-500.0, random_return=-1210.0, **done)
    make_run("running", "model=mlp", rows=rows + "5,640,-7", status="running", epochs_done=2)
    make_run("failed", "env=hopper", rows="1,128,12.5,,\n", status="failed", epochs_done=1, peak_return=None)
    make_run("waiting", "size=5m", "seed=7")
    (make_run("torn", "model=flow_v1", rows="") / "summary.json").write_text('{"status": "runn')


def test_table_of_every_state(runs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[-1]: line.split() for line in out.splitlines()[2:-1]}
    assert lines["finished"][:9] == [
        "flow_v2",
        "tiny",
        "pendulum",
        "0",
        "-400.0",
        "-500.0",
        "-1210.0",
        "4/4",
        "finished",
    ]
    assert lines["running"][:9] == f"mlp tiny pendulum 0 -400.0 -500.0 - 4/{compose().training.epochs} running".split()
    assert lines["failed"][:9] == ["flow_v2", "tiny", "hopper", "0", "-", "-", "-", "1/15000", "failed"]
    assert lines["waiting"][-3:] == ["not", "started", "waiting"]
    assert lines["waiting"][:4] == ["flow_v2", "5m", "pendulum", "7"]
    assert lines["torn"][0] == "flow_v1"
    picture = Path("runs/report.png")
    assert f"curves: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("status", ["memory", "storage"])
def test_table_of_what_ran_out(status, capsys):
    make_run(status, rows="1,128,-1300,,\n", status=status, epochs_done=1, epochs_planned=4)
    assert main(["runs"]) == 0
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line[-3:] == ["1/4", status, status]


def test_out_and_several_arguments(runs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["runs/finished", "runs/running", "runs/finished", "--out", "pictures/a.png"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert Path("pictures/a.png").is_file()


def test_nothing_to_draw(runs, capsys):
    assert main(["runs/waiting"]) == 0
    assert "none yet" in capsys.readouterr().out


def test_runs_are_found_once_and_in_depth(runs):
    assert len(find_runs([Path("runs"), Path("runs/finished"), Path()])) == 5


def test_columns_are_aligned(runs):
    lines = table([read_run(path) for path in find_runs([Path("runs")])]).splitlines()
    start = lines[0].index("status")
    assert len(lines) == 7
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)


def test_bad_input(capsys):
    Path("empty").mkdir()
    assert main(["nowhere"]) == 2
    assert main(["empty"]) == 2
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "nowhere is not a directory" in err
    assert "empty holds no run" in err
