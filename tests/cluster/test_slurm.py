"""Reading what SLURM writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_texts import CONFIG, JOB, NODES, PARTITIONS, SACCT, SQUEUE

from pwm_torchrl.cluster import slurm as query
from pwm_torchrl.cluster.restarts import write_job
from pwm_torchrl.cluster.slurm import (
    JobState,
    Partition,
    from_minutes,
    parse_config,
    parse_gpus,
    parse_nodes,
    parse_partitions,
    parse_sacct,
    parse_squeue,
    records,
    to_minutes,
)
from pwm_torchrl.errors import ConfigurationError


def test_jobs_of_squeue():
    jobs = parse_squeue(SQUEUE)
    assert jobs["33_0"] == JobState("33_0", "RUNNING", "", "1-02:00:04", "n[0-1]")
    assert jobs["11"] == JobState("11", "TIMEOUT", "TimeLimit", "1:24", "n0")
    assert {job for job, state in jobs.items() if state.waiting} == {"33_2", "35", "31", "42"}
    assert {job for job, state in jobs.items() if state.ended} == {"34", "11"}
    assert {job for job, state in jobs.items() if state.held} == {"31"}
    assert {job for job, state in jobs.items() if state.impossible} == {"42"}
    assert parse_squeue("") == {}


@pytest.mark.parametrize("state", ["COMPLETING", "REQUEUED", "CONFIGURING", "REQUEUE_HOLD", "SUSPENDED"])
def test_a_job_that_comes_back_has_not_ended(state):
    assert not JobState("1", state).ended


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue", "job requeued in held state"])
def test_held_jobs_have_many_names(reason):
    assert JobState("1", "PENDING", reason).held
    assert not JobState("1", "FAILED", reason).held


def test_jobs_of_sacct():
    jobs = parse_sacct("JobID|State|Elapsed|NodeList|Reason\n" + SACCT)
    assert {job: state.state for job, state in jobs.items()} == {
        "7": "COMPLETED",
        "8": "CANCELLED",
        "9_1": "OUT_OF_MEMORY",
    }
    assert jobs["8"].nodes == ""


def test_values_of_a_record_may_hold_blanks():
    (job,) = records(JOB + "\n")
    assert job["JobName"] == "my run=1" or job["JobName"] == "my"  # "run=1" looks like a key of its own
    assert job["Command"] == "/home/a b/script.sh"
    assert (job["DerivedExitCode"], job["Restarts"], job["PreemptTime"]) == ("0:125", "2", "2026-11-25T03:35:47")
    assert job["TRES"] == "cpu=1,mem=100M,node=1,billing=1"
    assert job["Power"] == ""
    assert records("slurm_load_jobs error: Invalid job id specified\n") == []


def test_partitions():
    main, gpu, old = parse_partitions(PARTITIONS)
    assert main == Partition("main", default=True, max_minutes=1440)
    assert gpu == Partition("gpu", max_nodes=2, max_cpus=48, max_memory_mb=400000)
    assert (old.up, old.default, old.max_minutes) == (False, False, 7 * 1440)


def test_nodes():
    nodes = {node.name: node for node in parse_nodes(NODES)}
    assert [name for name, node in nodes.items() if node.up] == ["n0", "g0", "g2", "o0"]
    assert (nodes["n0"].cpus, nodes["n0"].memory_mb, nodes["n0"].gpus, nodes["n0"].features) == (4, 6000, {}, ())
    assert nodes["g0"].gpus == {"l40s": 4}
    assert nodes["g0"].features == ("l40s", "ib")
    assert nodes["g2"].partitions == ("gpu",)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:l40s:4(S:0-1),lustre:1", {"l40s": 4}),
        ("gpu:2", {"": 2}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:4,gpu:v100:2,tmpfs:100G", {"a100": 4, "v100": 2}),
        ("gpu:1g.10gb:7(S:0,1)", {"1g.10gb": 7}),
        ("shard:l40s:8,(null)", {}),
        ("", {}),
    ],
)
def test_gpus(gres, gpus):
    assert parse_gpus(gres) == gpus


def test_settings_of_the_controller():
    config = parse_config(CONFIG)
    assert (config.version, config.cluster, config.max_array_size) == ("22.05.8", "throwaway", 11)
    assert (config.requeue_hold_s, config.kill_wait_s, config.remembers_s) == (5, 3, 600)
    assert not config.accounting
    assert not config.enforces_limits
    assert config.requeue
    assert config.max_memory_mb is None
    other = parse_config(
        "AccountingStorageType = accounting_storage/slurmdbd\nJobRequeue = 0\nEnforcePartLimits = ALL\n"
        "MaxMemPerNode = 250000\nAuthInfo = (null)\n"
    )
    assert other.accounting
    assert other.enforces_limits
    assert not other.requeue
    assert (other.max_memory_mb, other.requeue_hold_s) == (250000, 120)


# Asking SLURM, whose commands are scripts here ------------------------------------------------------------------------


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


# Times as SLURM writes them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("24:00:00", 1440),
        ("1-0", 1440),
        ("2-12:30", 3630),
        ("7-00:00:00", 10080),
        ("00:00:30", 1),
        ("infinite", None),
        ("UNLIMITED", None),
        ("n/a", None),
    ],
)
def test_every_way_of_writing(text, minutes):
    assert to_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "1.5", "1-2:3:4:5"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="is not a SLURM time limit"):
        to_minutes(text)


@given(st.integers(0, 10**6))
def test_there_and_back(minutes):
    assert to_minutes(from_minutes(minutes)) == minutes
