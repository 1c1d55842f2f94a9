"""What :mod:`pwm_torchrl.cluster.slurm` reads from a real SLURM."""

from __future__ import annotations

import pytest

from pwm_torchrl.cluster import slurm as query
from pwm_torchrl.cluster.resources import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Partition


def test_states_of_jobs(on_cluster, tmp_path):
    cluster = on_cluster
    done = cluster.sbatch("true", cwd=tmp_path)
    failed = cluster.sbatch("exit 3", cwd=tmp_path)
    array = cluster.sbatch("sleep 30", "--array=0-3%2", cwd=tmp_path)
    held = cluster.sbatch("true", "--hold", cwd=tmp_path)
    never = cluster.sbatch("true", "--time=3-0", cwd=tmp_path)
    cluster.wait_state(done, {"COMPLETED"})
    cluster.wait_state(failed, {"FAILED"})
    cluster.wait_state(f"{array}_1", {"RUNNING"})
    states = query.job_states([done, failed, array, held, never, "99999"])
    assert {job: state.state for job, state in states.items()} == {
        done: "COMPLETED",
        failed: "FAILED",
        **{f"{array}_{task}": "RUNNING" if task < 2 else "PENDING" for task in range(4)},
        held: "PENDING",
        never: "PENDING",
    }
    assert states[failed].reason == "NonZeroExitCode"
    assert states[f"{array}_3"].reason == "JobArrayTaskLimit"
    assert states[f"{array}_0"].nodes in cluster.nodes
    assert [job for job, state in states.items() if state.held] == [held]
    cluster.until(lambda: query.job_states([never])[never].impossible, 10, "the reason did not come")
    assert query.job_states(["99999"]) == {}
    assert [record["JobState"] for record in query.job_records(failed)] == ["FAILED"]
    assert {record["JobState"] for record in query.job_records(array)} == {"RUNNING", "PENDING"}
    assert query.job_records("99999") == query.job_records(f"{array}_9") == []


def test_nodes_partitions_and_settings(on_cluster):
    cluster = on_cluster
    assert query.slurm_available()
    site = query.site()
    config, partitions = site.config, site.partitions
    assert (config.max_array_size, config.requeue_hold_s, config.kill_wait_s) == (11, 5, 8)
    assert not config.accounting
    assert [partition.name for partition in partitions] == ["main", "low", "high"]
    assert partitions[0] == Partition("main", default=True, max_minutes=1440)
    nodes = site.nodes
    assert [node.name for node in nodes] == cluster.nodes
    assert all(node.up and node.cpus == 4 and node.memory_mb == 6000 and node.gpus == {"l40s": 2} for node in nodes)


@pytest.mark.parametrize(
    ("demand", "options"),
    [
        (JobRequest(memory_mb=7000), ["--mem=7000"]),
        (JobRequest(gpus=(("", 3),)), ["--gpus-per-node=3"]),
        (JobRequest(partition="nope"), ["--partition=nope"]),
        (JobRequest(cpus=5), ["--cpus-per-task=5"]),
        (JobRequest(nodes=3), ["--nodes=3"]),
        (JobRequest(minutes=1441), ["--time=1441"]),
    ],
    ids=str,
)
def test_what_is_said_to_never_run_never_runs(on_cluster, tmp_path, demand, options):
    """Slurm refuses some of it and lets the rest wait for ever, which is why it is looked at before."""
    assert why_impossible(demand, query.site())
    (tmp_path / "job.sh").write_text("#!/bin/bash\n")
    done = on_cluster.run(["sbatch", "--parsable", *options, tmp_path / "job.sh"], check=False)
    if done.returncode == 0:
        job = done.stdout.strip()
        on_cluster.until(lambda: query.job_states([job])[job].impossible, 10, "it is not said to be impossible")


def test_a_cluster_that_cannot_be_reached_is_a_sentence(on_cluster, monkeypatch):
    monkeypatch.setattr(query, "TIMEOUT_S", 0.5)
    monkeypatch.setenv("SLURM_CONF", "/does/not/exist/slurm.conf")
    assert query.slurm_available()
    with pytest.raises(query.SlurmError) as caught:
        query.job_states(["1"])
    assert len(str(caught.value).splitlines()) == 1
