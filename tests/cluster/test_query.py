"""Asking SLURM, whose commands are scripts here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from slurm_texts import CONFIG, JOB, NODES, PARTITIONS, SQUEUE

from pwm_torchrl.cluster import slurm as query
from pwm_torchrl.cluster.restarts import write_job
from pwm_torchrl.errors import ConfigurationError


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes commands of shell; each writes its arguments into a file ``NAME.asked``."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            file = tmp_path / name
            file.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / name}.asked\n{script}\n')
            file.chmod(0o755)
        return tmp_path

    return make


def echo(text: str) -> str:
    return f"cat <<'END'\n{text.rstrip()}\nEND"


def test_all_jobs_by_one_call(commands):
    folder = commands(squeue=echo(SQUEUE), sacct="echo unexpected >&2; exit 1")
    states = query.job_states(["33_0", "11", "33_2"])
    assert states["11"].state == "TIMEOUT"
    (asked,) = (folder / "squeue.asked").read_text().splitlines()
    assert "-t all" in asked
    assert "-j 33_0,11,33_2" in asked
    assert not (folder / "sacct.asked").exists()


def test_those_that_it_forgot_are_asked_of_accounting(commands):
    folder = commands(squeue=echo(SQUEUE), sacct=echo("7|FAILED|00:01|n0|None"))
    states = query.job_states(["33", "7", "8"])
    assert states["7"].state == "FAILED"
    assert "8" not in states
    assert (folder / "sacct.asked").read_text().endswith("-j 7,8\n")


def test_without_accounting_they_are_left_out(commands):
    commands(squeue="true", sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert query.job_states(["7"]) == {}


def test_a_single_unknown_job_is_no_error(commands):
    folder = commands(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", sacct="true")
    assert query.job_states(["7"]) == {}
    assert "-j 7,7" in (folder / "squeue.asked").read_text()


def test_no_jobs_are_not_asked_for(commands):
    folder = commands(squeue="true")
    assert query.job_states([]) == {}
    assert not (folder / "squeue.asked").exists()


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("exec sleep 30", "SLURM did not answer squeue within 0.3 s"),
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
            "SLURM's controller does not answer squeue (Unable to contact slurm controller (connect failure))",
        ),
        ("echo 'squeue: error: Invalid user: me' >&2; exit 1", "SLURM refused squeue: Invalid user: me"),
        ("exit 1", "SLURM refused squeue: no message"),
        (
            "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1",
            "this machine is not set up for a cluster",
        ),
    ],
)
def test_no_answer_is_one_sentence(commands, monkeypatch, script, sentence):
    monkeypatch.setattr(query, "TIMEOUT_S", 0.3)
    commands(squeue=script)
    with pytest.raises(query.SlurmError) as caught:
        query.job_states(["7"])
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, ConfigurationError)


def test_missing_commands_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(query.SlurmError, match="command squeue was not found"):
        query.job_states(["7"])


def test_where_slurm_is(commands, monkeypatch):
    assert not query.slurm_available() or Path("/usr/bin/sbatch").exists()
    everything = dict.fromkeys(query.COMMANDS, "true")
    commands(**everything)
    assert query.slurm_available()
    commands(scontrol="echo 'Slurmctld(primary) at vm is DOWN'; exit 1")
    assert query.slurm_available()
    commands(scontrol="echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    assert not query.slurm_available()
    monkeypatch.setattr(query, "TIMEOUT_S", 0.3)
    commands(scontrol="exec sleep 30")
    assert query.slurm_available()


@pytest.mark.parametrize(
    ("job_ids", "live"),
    [(["34", "33_0"], "33_0"), (["33_0", "34"], "33_0"), (["11", "7"], None), (["31"], "31"), ([], None)],
)
def test_the_live_job_of_a_run(commands, tmp_path, job_ids, live):
    commands(squeue=echo(SQUEUE), sacct="true")
    assert query.live_job(tmp_path) is None
    write_job(tmp_path, job_ids=job_ids)
    job = query.live_job(tmp_path)
    assert (job and job.job_id) == live


def test_records_of_a_job(commands):
    folder = commands(scontrol=echo(JOB))
    (record,) = query.job_records("33_1")
    assert record["DerivedExitCode"] == "0:125"
    assert "--details show job 33_1" in (folder / "scontrol.asked").read_text()
    commands(scontrol="echo 'Job 33_9 not found'; exit 1")
    assert query.job_records("33_9") == []
    commands(scontrol="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(query.SlurmError):
        query.job_records("33_9")


def test_everything_of_a_site(commands):
    script = f'case "$*" in *config*) {echo(CONFIG)}\n;; *node*) {echo(NODES)}\n;; *) {echo(PARTITIONS)}\n;; esac'
    folder = commands(scontrol=script)
    site = query.site()
    assert site.config.max_array_size == 11
    assert [partition.name for partition in site.partitions] == ["main", "gpu", "old"]
    assert len(site.nodes) == 6
    assert len((folder / "scontrol.asked").read_text().splitlines()) == 3
