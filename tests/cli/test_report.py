"""``launch/report.py``: what it prints and writes, of runs in every state."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.config import Config
from pwm_torchrl.run import claims
from pwm_torchrl.run.claims import Identity
from pwm_torchrl.run.directory import prepare_run_dir

main = partial(run_command, "report")

pytestmark = pytest.mark.usefixtures("workdir")

METRICS = "epoch,env_steps,train/return,eval/return_mean,eval/return_std\n"


@functools.lru_cache
def composed(*words: str) -> Config:
    return compose(list(words))


def make_run(name: str, *words: str, rows: str | None = None, **summary) -> Path:
    path = prepare_run_dir(replace(composed(*words), run_dir=f"runs/{name}")).path
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


def lines_of(out: str) -> dict[str, list[str]]:
    """The words of the table of runs, by the run's name."""
    table = out.split("\n\n")[0].splitlines()[2:]
    return {line.split()[-1]: line.split() for line in table}


def files_in(folder: str = "runs") -> set[str]:
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


def test_table_of_every_state(runs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    lines = lines_of(out)
    expected = ["residual", "tiny", "pendulum", "0", "-400.0", "-500.0", "-1210.0", "4/4", "finished"]
    assert lines["finished"][:9] == expected
    assert lines["running"][:9] == f"mlp tiny pendulum 0 -400.0 -500.0 - 4/{composed().training.epochs} running".split()
    assert lines["failed"][:9] == ["residual", "tiny", "hopper", "0", "-", "-", "-", "1/15000", "failed"]
    assert lines["waiting"][8:10] == ["not", "started"]
    assert lines["waiting"][:4] == ["residual", "5m", "pendulum", "7"]
    assert lines["torn"][0] == "flow_v1"
    assert "report: runs/report.html" in out
    assert Path("runs/report_returns.png").read_bytes().startswith(b"\x89PNG")
    page = Path("runs/report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert all(f">{name}</td>" in page for name in lines)


def test_nothing_is_written_into_a_run(runs):
    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/**")}
    contents = {path: path.read_bytes() for path in Path("runs").glob("*/*")}
    assert main(["runs"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/**")} == before
    assert {path: path.read_bytes() for path in Path("runs").glob("*/*")} == contents
    assert main(["runs", "--out", "elsewhere/report"]) == 0
    assert "report.html" in files_in("elsewhere/report")


@pytest.mark.parametrize("status", ["memory", "storage"])
def test_table_of_what_ran_out(status, capsys):
    path = make_run(status, rows="1,128,-1300,,\n", status=status, epochs_done=1, epochs_planned=4, restarts=2)
    events = [{"event": "restart", "reason": "memory"}, {"event": status, "error": "OutOfMemory: no room"}]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert " ".join(lines_of(out)[status][7:]).startswith(f"1/4 {status} 2: 1 memory, 1 by hand")
    assert f"  {status}: OutOfMemory: no room" in out


def test_a_process_that_is_gone_is_not_running(capsys):
    """Killed with -9, it could not write that it ended; of a process elsewhere nothing is known."""
    here = Identity.here({})
    for name, owner in {
        "alive": here,
        "killed": replace(here, pid=2**22 + 1),
        "far": replace(here, host="far"),
    }.items():
        path = make_run(name, rows="1,128,-1300,,\n", status="running", epochs_done=1, epochs_planned=4)
        (path / claims.FOLDER).mkdir()
        (path / claims.FOLDER / "000001.json").write_text(json.dumps(claims.Claim(1, owner).as_dict()))
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    shown = {name: line[8] for name, line in lines_of(out).items()}
    assert shown == {"alive": "running", "killed": "died", "far": "running"}
    (told,) = [line for line in out.splitlines() if line.startswith("  killed: ")]
    assert f"process {2**22 + 1} on {here.host} ended without recording a reason" in told
    assert "python launch/resume.py" in told
    page = Path("runs/report.html").read_text()
    assert (page.count(">died</td>"), page.count(">running</td>")) == (1, 2)


def test_several_arguments(runs, capsys):
    assert main(["runs/finished", "runs/running", "runs/finished"]) == 0
    assert len(lines_of(capsys.readouterr().out)) == 2
    assert "report.html" in files_in(".")


def test_nothing_to_draw(runs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["runs/waiting"]) == 0
    assert "none yet" in capsys.readouterr().out
    assert "data:image" not in Path("runs/waiting/report.html").read_text()


def test_without_matplotlib_the_tables_come(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "no figures: matplotlib is not installed; pip install 'pwm-torchrl[plot]'" in out
    assert files_in() == {"report.html"}
    assert ">finished</td>" in Path("runs/report.html").read_text()


def test_comparison(capsys):
    done = {"status": "finished", "epochs_done": 2, "epochs_planned": 4}
    for model, base in (("mlp", -500.0), ("residual", -300.0)):
        for seed in (0, 1):
            final = base + seed
            rows = f"1,128,-1300,,\n2,256,-1200,{final},50\n"
            words = (f"model={model}", f"seed={seed}", "training.epochs=4")
            make_run(f"{model}{seed}", *words, rows=rows, final_return=final, peak_return=final, **done)
    assert main(["runs", "--compare", "model", "--baseline", "residual"]) == 0
    out = capsys.readouterr().out
    assert "final IQM - residual" in out
    assert {"compare.csv", "compare_curves.csv", "compare.tex", "report.html"} <= files_in()
    with Path("runs/compare.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert (rows["mlp"]["final_iqm"], rows["mlp"]["difference_iqm"]) == ("-499.5", "-200.0")
    assert "mlp & 2 of 2 & $-499.5$ [$-500.0$, $-499.0$]" in Path("runs/compare.tex").read_text()
    assert "Comparison of model" in Path("runs/report.html").read_text()


def test_a_refused_comparison_writes_nothing(runs, capsys):
    make_run("mlp", "model=mlp", "algorithm.horizon=8", "training.epochs=4")
    words = ["runs/finished", "runs/mlp", "--compare", "model", "--out", "out"]
    assert main(words) == 2
    assert "algorithm.horizon (8 in mlp, 3 in finished)" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([*words, "--allow-differences"]) == 0
    assert "note: runs also differ in algorithm.horizon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["empty"], "empty holds no run"),
        ([], "required: RUNS"),
        (["empty", "--baseline", "mlp"], "need --compare KEY"),
        (["one", "--out", "a.png"], "--out=a.png is a file; give a folder"),
        (["one", "--out", "one/config.yaml"], "--out=one/config.yaml is a file; give a folder"),
        (["one", "--out", "one/config.yaml/deeper"], "--out=one/config.yaml/deeper cannot be written"),
        (["one", "--compare", "model"], "every run has model=residual"),
        (["one", "--compare", "model"], "submit.py model=mlp size=tiny env=pendulum seed=0"),
        (["one", "--where", "model=mlp"], "--where model=mlp: no run has this value; the runs have residual"),
        (["one", "--where", "modle=mlp"], "unknown key; nearest: "),
        (["one", "--where", "seed"], "--where seed: write KEY=VALUE"),
    ],
)
def test_bad_input(words, sentence, capsys):
    Path("empty").mkdir()
    prepare_run_dir(replace(composed(), run_dir="one"))
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_an_untidy_folder(capsys):
    """Failed, killed, torn and repeated runs, other folders: the error says what to add, and that works."""
    done = {"status": "finished", "epochs_done": 2, "epochs_planned": 4}
    for name, words in {
        "mlp0": ("model=mlp",), "again": ("model=mlp",), "short": ("model=mlp", "algorithm.horizon=8"),
        "residual0": ("model=residual",), "hopper": ("model=mlp", "env=hopper"),
    }.items():  # fmt: skip
        make_run(name, *words, rows="1,128,-1300,,\n2,256,-1200,-500,50\n", final_return=-500.0, **done)
    make_run("failed", "model=mlp", "algorithm.model_lr=1.0", status="failed", epochs_done=0, epochs_planned=4)
    (make_run("torn", "model=mlp", **done) / "config.yaml").write_text("mode: online\nseed: 0\nmodel: {na")
    (make_run("empty", "model=residual", rows="") / "summary.json").write_text("")
    for folder in ("notes", "plots"):
        (Path("runs") / folder).mkdir()
        (Path("runs") / folder / "config.yaml").write_text("title: mine\n")
    assert main(["runs"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert sorted(lines) == sorted(["mlp0", "again", "short", "residual0", "hopper", "failed", "torn", "empty"])
    assert main(["runs", "--compare", "model"]) == 2
    told = re.search(r"; add (.*) \(leaves 3 of 8 runs\)", capsys.readouterr().err)
    assert told is not None
    assert main(["runs", "--compare", "model", *shlex.split(told[1])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 of 8 runs: ")
    assert "final IQM - mlp" in out
    assert "--newest" in Path("runs/report.html").read_text()


def test_a_run_that_nobody_named_is_not_written_to(monkeypatch, capsys):
    prepare_run_dir(replace(composed(), run_dir="one"))
    prepare_run_dir(replace(composed(), run_dir="two"))
    monkeypatch.chdir("one")
    assert main([".", "../two"]) == 2
    assert "say where to write: --out DIR" in capsys.readouterr().err
