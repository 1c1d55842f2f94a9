"""Jobs that wait for another run's job, without a cluster."""

from __future__ import annotations

import pytest

from pwm_torchrl.cluster import end_of_job, submission
from pwm_torchrl.cluster.resources import Resources, sbatch_parameters
from pwm_torchrl.cluster.restarts import JobExecution, NextPlan, write_job
from pwm_torchrl.cluster.slurm import JobState
from pwm_torchrl.config import Config
from pwm_torchrl.run.directory import save_config


def job(state: str) -> JobState:
    return JobState("7", state, "None", "")


@pytest.fixture
def pretraining(tmp_path):
    save_config(Config(mode="pretrain"), tmp_path)
    return tmp_path


def test_sbatch_is_told():
    resources = Resources(1024, 1, 0, 1, 5)
    alone = sbatch_parameters(Config(), resources, "name")["additional_parameters"]
    waits = sbatch_parameters(Config(), resources, "name", "12_3")["additional_parameters"]
    assert waits.items() - alone.items() == {("dependency", "afterok:12_3"), ("kill-on-invalid-dep", "yes")}
    assert alone.items() <= waits.items()


@pytest.mark.parametrize(("live", "expected"), [("RUNNING", None), (None, "abc")])
def test_a_world_model_that_is_being_trained_is_not_pinned(pretraining, monkeypatch, live, expected):
    """Its best so far has a hash that it will not keep."""
    monkeypatch.setattr(submission, "live_job", lambda run: job(live) if live and run == pretraining else None)
    for folder in (pretraining, pretraining / "world_model"):
        cfg = Config(mode="extract", world_model=str(folder), world_model_sha256="abc")
        submission.unpin_world_model(cfg)
        assert cfg.world_model_sha256 == expected
        assert submission.pretraining_of(cfg) == (pretraining if live else None)


def test_what_comes_from_elsewhere_is_waited_for_by_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "live_job", lambda run: pytest.fail("nobody trains it"))
    cfg = Config(mode="extract", world_model=str(tmp_path), world_model_sha256="abc")
    submission.unpin_world_model(cfg)
    assert cfg.world_model_sha256 == "abc"
    submission.unpin_world_model(Config())


def test_dependents_move_to_the_job_that_takes_over(pretraining, monkeypatch):
    asked = []

    def scontrol(*words):
        asked.append(words)
        return "Access denied" if words[1] == "JobId=8_1" else None

    monkeypatch.setattr(submission, "scontrol", scontrol)
    assert submission.move_dependents(pretraining, "9") == []
    write_job(pretraining, awaited_by=["8_0", "8_1"])
    assert submission.move_dependents(pretraining, "9") == ["Access denied"]
    assert asked == [("update", f"JobId=8_{task}", "Dependency=afterok:9") for task in (0, 1)]


def test_dependents_are_told_before_their_job_is_cancelled(pretraining, monkeypatch, capsys):
    """Where a site forbids changing a request, another job takes over; cancelling first would cancel them, too."""
    done = []
    monkeypatch.setattr(end_of_job, "load_config", lambda run: Config())
    monkeypatch.setattr(end_of_job, "scontrol", lambda *words: "Access denied")
    monkeypatch.setattr(
        end_of_job, "resubmit", lambda run, cfg, asked, job: done.append(f"queued {asked.mem_mb}") or "9"
    )
    monkeypatch.setattr(submission, "scontrol", lambda *words: done.append(" ".join(words)))
    monkeypatch.setattr(end_of_job.subprocess, "run", lambda command, check: done.append(" ".join(command)))
    write_job(pretraining, job_ids=["7"], awaited_by=["8"], **Resources(1024, 1, 0, 1, 5).as_dict())
    execution = JobExecution("7", 0)
    assert end_of_job._ask_for_memory(pretraining, execution, NextPlan(2048, {}, "more memory")) == 75
    assert done == ["queued 2048", "update JobId=8 Dependency=afterok:9", "scancel 7"]
    assert "a new job continues the run" in capsys.readouterr().out
