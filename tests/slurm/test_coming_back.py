"""Runs on a real Slurm that are killed, and come back by themselves."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from functools import partial

import pytest
from run_cases import events, last_epoch, metrics, summary

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.training import train

resume = partial(run_command, "resume")
status = partial(run_command, "status")


def undisturbed(run_dir, tmp_path):
    """Metrics of the same run without a job, in this process."""
    cfg = load_config(run_dir)
    cfg.env["trouble"] = str(tmp_path / "none")
    straight = tmp_path / "straight"
    straight.mkdir()
    train(cfg, straight)
    return metrics(straight)


def test_three_different_deaths_and_the_same_result(place, tmp_path, monkeypatch):
    """Requeued from outside, pushed aside by another job, and at its time limit."""
    place.trouble.write_text("slow 1 0.4")
    words = ["cluster.partition=low", "cluster.signal_delay_s=20", "training.epochs=40"]
    run_dir, job = place.submit(*words)

    place.wait_for_epoch(run_dir, 1)
    place.cluster.run(["scontrol", "requeue", job])
    place.until(lambda: len(list((run_dir / "attempts").glob("00000?.json"))), lambda n: n >= 2, run_dir, 60)
    place.wait_for_epoch(run_dir, 3)

    # Preemption: the whole of the nodes for a more important job.
    other = place.cluster.sbatch("sleep 2", "-p", "high", "-N2", "--exclusive", cwd=tmp_path)
    place.until(lambda: len(events(run_dir, "restart")), lambda n: n >= 2, run_dir, 60)
    place.cluster.wait_state(other, {"COMPLETED"}, 60)
    place.until(lambda: len(list((run_dir / "attempts").glob("00000?.json"))), lambda n: n >= 3, run_dir, 60)
    place.wait_for_epoch(run_dir, last_epoch(run_dir) + 1)  # or the third attempt would have got no further

    end = (datetime.now() + timedelta(seconds=25)).strftime("%Y-%m-%dT%H:%M:%S")
    place.cluster.run(["scontrol", "update", f"JobId={job}", f"EndTime={end}"])
    place.until(lambda: len(events(run_dir, "restart")), lambda n: n >= 3, run_dir, 90)
    place.cluster.run(["scontrol", "update", f"JobId={job}", "TimeLimit=10"])
    place.trouble.unlink()
    ended = place.wait_for(run_dir, "finished")

    restarts = events(run_dir, "restart")
    assert [each["reason"] for each in restarts] == ["requeue", "preemption", "timeout"], place.told(run_dir)
    assert all(each["progressed"] for each in restarts)
    assert (ended["epochs_done"], ended["restarts"], ended["resume_exact"]) == (40, 3, True)
    assert metrics(run_dir) == undisturbed(run_dir, tmp_path)


def test_a_step_killed_for_memory_comes_back_with_more(place, tmp_path, capsys):
    """The environment holds more than was asked for; the answer is the next plan, by the same job."""
    place.trouble.write_text("grow 20 900")
    run_dir, job = place.submit("cluster.mem_gib=1", "memory.stop_at=1")
    ended = place.wait_for(run_dir, "finished", 120)
    (restart,) = events(run_dir, "restart")
    assert (restart["reason"], restart["answer"]) == ("memory", "resubmit")
    assert "--mem 1024 -> 1536 MiB" in restart["detail"]
    assert place.cluster.job(job)["Restarts"] == "1"
    assert json.loads((run_dir / "job.json").read_text())["mem_mb"] == 1536
    assert ended["resume_exact"]
    assert metrics(run_dir) == undisturbed(run_dir, tmp_path)
    assert status([str(run_dir)]) == 0
    assert "1: 1 memory" in capsys.readouterr().out


def test_a_worker_killed_for_memory_is_told_from_a_bug(place):
    """The run itself survives and sees a broken worker; the kernel killed it for memory."""
    place.trouble.write_text("child_grows 20 1500")
    run_dir, job = place.submit("cluster.max_memory_restarts=0")
    place.cluster.wait_state(job, {"FAILED", "COMPLETED"}, 90)
    place.wait_for(run_dir, "memory")
    assert "memory ran out again after 0" in events(run_dir, "memory")[-1]["error"]


def test_a_bug_is_not_tried_again(place):
    place.trouble.write_text("bug 20")
    run_dir, job = place.submit()
    place.wait_for(run_dir, "failed")
    place.cluster.wait_state(job, {"FAILED"})
    assert not events(run_dir, "restart")
    assert "KeyError" in events(run_dir, "failed")[-1]["error"]


def test_killed_and_then_the_node_fails(place, tmp_path):
    """SIGKILL from nowhere, then a node that dies with all that was on it."""
    place.trouble.write_text(f"die 30 {tmp_path / 'seen'}")
    run_dir, job = place.submit("training.epochs=30")
    place.until(lambda: len(events(run_dir, "restart")), lambda n: n >= 1, run_dir, 60)
    place.trouble.write_text("slow 1 0.4")
    place.until(lambda: len(list((run_dir / "attempts").glob("00000?.json"))), lambda n: n >= 2, run_dir, 60)
    place.wait_for_epoch(run_dir, 9)
    place.cluster.kill_node(place.cluster.job(job)["NodeList"])
    place.trouble.unlink()
    ended = place.wait_for(run_dir, "finished", 120)
    assert [each["reason"] for each in events(run_dir, "restart")] == ["killed", "node_failure"]
    assert (ended["epochs_done"], ended["restarts"], ended["resume_exact"]) == (30, 2, True)
    assert metrics(run_dir) == undisturbed(run_dir, tmp_path)


def test_a_directory_has_one_owner(place, capsys):
    """While a job trains, nobody else does, and resume.py leaves it alone; once it is cancelled, it goes on."""
    place.trouble.write_text("slow 1 0.4")
    run_dir, job = place.submit("training.epochs=60")
    place.wait_for_epoch(run_dir, 1)
    with pytest.raises(ConfigurationError, match=rf"is in use by SLURM job {job}, process \d+ on "):
        train(load_config(run_dir), run_dir, resume=True)
    assert resume([str(run_dir)]) == 0
    assert f"not resumed, job {job} is running" in capsys.readouterr().out
    place.cluster.run(["scancel", job])
    place.cluster.wait_state(job, {"CANCELLED"})
    place.trouble.unlink()
    assert resume([str(run_dir)]) == 0
    assert place.job(run_dir) != job
    place.wait_for(run_dir, "finished")
    assert resume([str(run_dir)]) == 0
    assert "not resumed, finished" in capsys.readouterr().out
    assert summary(run_dir)["resume_exact"]
