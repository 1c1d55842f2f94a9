"""Runs on a real Slurm: submitted alone and as an array, queued, refused, and on several tasks."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
from run_cases import SMALL, events, last_row, summary

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.training import train

main = partial(run_command, "submit")


def test_submit_and_result(place, capsys):
    run_dir, job = place.submit()
    out = capsys.readouterr().out
    assert f"job {job}: {run_dir}" in out
    assert f"python launch/status.py {run_dir}" in out
    # Somebody submits the same directory again.
    assert main([*SMALL, f"env.trouble={place.trouble}", f"run_dir={run_dir}"]) == 2
    assert f"has SLURM job {job}, which is " in capsys.readouterr().err
    place.wait_for(run_dir, "finished")
    place.cluster.wait_state(job, {"COMPLETED"})
    assert summary(run_dir)["epochs_done"] == 12
    assert [event["job_id"] for event in events(run_dir, "submit")] == [job]
    asked = json.loads((run_dir / "job.json").read_text())
    assert {key: asked[key] for key in ("mem_mb", "cpus", "gpus", "time_min")} == {
        "mem_mb": 1228,
        "cpus": 1,
        "gpus": 0,
        "time_min": 5,
    }


def test_an_array_with_a_throttle(place, capsys):
    """Two seeds of two models, one job array, at most two at a time; a task is a run."""
    words = [word for word in SMALL if word != "model=mlp"]
    sweep = ["model=mlp,residual", "seed=1,2", "cluster.array_parallelism=2", f"runs_dir={place.folder / 'runs'}"]
    assert main([*words, f"env.trouble={place.trouble}", "training.epochs=3", *sweep]) == 0
    lines = re.findall(r"job (\d+)_(\d): (\S+)", capsys.readouterr().out)
    (array,) = {number for number, _, _ in lines}
    runs = {int(task): place.folder / run for _, task, run in lines}
    assert place.cluster.job(f"{array}_3")["ArrayTaskThrottle"] == "2"
    found = []
    for task, run in runs.items():
        place.wait_for(run, "finished", 120)
        cfg = load_config(run)
        found.append((cfg.model.name, cfg.seed))
        assert place.job(run) == f"{array}_{task}"
        assert place.cluster.job(f"{array}_{task}")["JobName"] == run.name
    assert found == [("mlp", 1), ("mlp", 2), ("residual", 1), ("residual", 2)]


def test_a_job_that_is_cancelled_before_it_begins(place, capsys):
    blocker = place.cluster.sbatch("sleep 60", "-N2", "--exclusive", cwd=place.folder)
    place.cluster.wait_state(blocker, {"RUNNING"})
    run_dir, job = place.submit("training.epochs=2")
    place.cluster.run(["scancel", job])
    place.cluster.wait_state(job, {"CANCELLED"})
    capsys.readouterr()
    assert run_command("status", [str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "cancelled"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("cluster.mem_gib=100", "cluster.mem_gib"),
        ("cluster.cpus=64", "cluster.cpus"),
        ("cluster.nodes=9", "cluster.nodes"),
        ("cluster.partition=nowhere", "cluster.partition=nowhere does not exist; choose one of main, low, high"),
        ("cluster.time_min=9999", "cluster.max_time_min=1440"),
    ],
)
def test_what_could_never_run_is_refused(word, sentence, place, capsys):
    """Before anything is written: SLURM itself would let some of these wait for ever."""
    run_dir = place.folder / "runs" / "run"
    assert main([*SMALL, f"env.trouble={place.trouble}", f"run_dir={run_dir}", word]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not run_dir.exists()
    assert not place.cluster.run(["squeue", "-h"]).stdout


def test_a_dry_run_shows_all_and_does_nothing(place, capsys):
    assert main([*SMALL, f"env.trouble={place.trouble}", "seed=1,2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in (
        "# configuration of the first of 2 runs",
        "# memory plan of model=mlp",
        "one array of 2",
        "mem: 1228M",
    ):
        assert text in out
    assert not (place.folder / "runs").exists()
    assert not place.cluster.run(["squeue", "-h"]).stdout


def test_a_checkout_edited_while_queued_changes_no_job(place):
    blocker = place.cluster.sbatch("sleep 60", "-N2", "--exclusive", cwd=place.folder)
    place.cluster.wait_state(blocker, {"RUNNING"})
    run_dir, job = place.submit("training.epochs=2")
    assert place.cluster.job(job)["JobState"] == "PENDING"
    (place.folder / "pole.py").write_text("raise RuntimeError('the edited code')\n")
    place.cluster.run(["scancel", blocker])
    place.wait_for(run_dir, "finished")


def test_two_tasks_train_as_one(place, tmp_path):
    """Data-parallel, a task for each of two (fake) GPUs on a node, computing on the CPU; equal to one process."""
    words = ["cluster.gres=gpu:2", "cluster.gpus=2", "cluster.gpu=l40s", "cluster.mem_gib=3.5", "training.epochs=3"]
    run_dir, job = place.submit(*words)
    ended = place.wait_for(run_dir, "finished", 120)
    assert place.cluster.job(job)["NumTasks"] == "2"
    assert ended["epochs_done"] == 3
    cfg = load_config(run_dir)
    straight = tmp_path / "straight"
    straight.mkdir()
    train(cfg, straight)
    ours, theirs = last_row(run_dir), last_row(straight)
    for key in ("loss/model", "loss/actor", "loss/critic", "grad_norm/model"):
        assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-3)
