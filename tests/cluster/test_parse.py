"""Reading what SLURM writes."""

from __future__ import annotations

import pytest
from slurm_texts import CONFIG, JOB, NODES, PARTITIONS, SACCT, SQUEUE

from pwm_torchrl.cluster.slurm import (
    JobState,
    Partition,
    parse_config,
    parse_gpus,
    parse_nodes,
    parse_partitions,
    parse_sacct,
    parse_squeue,
    records,
)


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
