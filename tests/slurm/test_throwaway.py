"""The throw-away cluster itself: jobs run, memory is held to what was asked for, nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from leftovers import OWNER, identity, stop_orphans
from slurm_files import Shape
from throwaway import reason_to_skip, running_cluster

EAT = f"{sys.executable} -c 'import time; held = bytearray(300 << 20); time.sleep(20)'"


def test_a_batch_script_runs(cluster, tmp_path):
    job = cluster.sbatch('echo "on $SLURMD_NODENAME"; srun -n2 printenv SLURM_PROCID', "-n2", cwd=tmp_path)
    record = cluster.wait_state(job, {"COMPLETED"})
    node, *ranks = (tmp_path / f"{job}.out").read_text().splitlines()
    assert node == f"on {record['NodeList']}"
    assert sorted(ranks) == ["0", "1"]


def test_submitit_submits_and_reads_the_result(on_cluster, tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm")
    executor = slurm.SlurmExecutor(folder=tmp_path)
    # submitit asks for SIGUSR2 90 s before the limit: a shorter limit may kill the job before it has a handler.
    executor.update_parameters(time=5, mem="500MB", gpus_per_node=1)
    job = executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert job.result() == "0"
    assert job.get_info(mode="force")["State"] == "COMPLETED"
    jobs = executor.map_array(abs, [-1, 2])
    assert [each.result() for each in jobs] == [1, 2]


def test_a_step_is_held_to_its_memory(cluster, tmp_path):
    job = cluster.sbatch(f"srun {EAT}; echo after", "--mem=100M", cwd=tmp_path)
    cluster.wait_state(job, {"COMPLETED", "OUT_OF_MEMORY", "CANCELLED"})
    output = (tmp_path / f"{job}.out").read_text()
    assert "oom" in output.lower() or "exceeded memory" in output, output


def test_two_nodes_take_a_task_each(cluster, tmp_path):
    job = cluster.sbatch("srun printenv SLURMD_NODENAME", "-N2", "--ntasks-per-node=1", cwd=tmp_path)
    cluster.wait_state(job, {"COMPLETED"})
    assert sorted((tmp_path / f"{job}.out").read_text().split()) == cluster.nodes


def test_a_failed_wait_says_how_the_job_ended(cluster, tmp_path):
    job = cluster.sbatch("exit 3", cwd=tmp_path)
    with pytest.raises(AssertionError, match="'ExitCode': '3:0'"):
        cluster.wait_state(job, {"COMPLETED"})


def test_orphans_of_a_killed_session_are_stopped():
    owner = subprocess.Popen(["sleep", "100"])
    orphan = subprocess.Popen(["sleep", "100"], env={**os.environ, OWNER: identity(owner.pid)})
    try:
        stop_orphans()
        assert orphan.poll() is None
        owner.kill()
        owner.wait()
        stop_orphans()
        assert orphan.wait(10) == -9
    finally:
        owner.kill()
        orphan.kill()
        owner.wait()
        orphan.wait()


def test_a_job_comes_back_on_another_node_when_its_own_dies(cluster, tmp_path):
    script = 'echo "$SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || srun sleep 60'
    job = cluster.sbatch(script, "--open-mode=append", cwd=tmp_path)
    cluster.wait_state(job, {"RUNNING"})
    output = tmp_path / f"{job}.out"
    cluster.until(lambda: output.exists() and output.read_text(), 10, "the script did not start")
    died = cluster.job(job)["NodeList"]
    other = next(node for node in cluster.nodes if node != died)
    bystander = cluster.sbatch("srun sleep 60", f"--nodelist={other}", cwd=tmp_path)
    cluster.wait_state(bystander, {"RUNNING"})
    cluster.kill_node(died)
    assert cluster.wait_state(job, {"COMPLETED"})["NodeList"] == other
    assert output.read_text().splitlines() == [f"{died} 0", f"{other} 1"]
    assert cluster.job(bystander)["JobState"] == "RUNNING"


@pytest.mark.slow
def test_memory_is_polled_where_there_are_no_cgroups(tmp_path):
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with running_cluster(Shape(nodes=1, gpus=0, enforce="poll")) as cluster:
        job = cluster.sbatch(f"srun {EAT}; echo after", "--mem=100M", cwd=tmp_path)
        cluster.wait_state(job, {"COMPLETED", "OUT_OF_MEMORY", "CANCELLED"})
        assert "exceeded memory limit" in (tmp_path / f"{job}.out").read_text()
