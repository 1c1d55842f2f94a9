"""The throw-away cluster itself: jobs run, memory is held to what was asked for, nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from throwaway import OWNER, stop_orphans


def test_a_batch_script_runs(cluster, tmp_path):
    job = cluster.sbatch('echo "on $SLURMD_NODENAME"; srun -n2 printenv SLURM_PROCID', "-n2", cwd=tmp_path)
    record = cluster.wait_state(job, {"COMPLETED"})
    node, *ranks = (tmp_path / f"{job}.out").read_text().splitlines()
    assert node == f"on {record['NodeList']}"
    assert sorted(ranks) == ["0", "1"]


def test_submitit_submits_and_reads_the_result(on_cluster, tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm")
    executor = slurm.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(time=1, mem="500MB", gpus_per_node=1)
    job = executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert job.result() == "0"
    assert job.get_info(mode="force")["State"] == "COMPLETED"
    jobs = executor.map_array(abs, [-1, 2])
    assert [each.result() for each in jobs] == [1, 2]


def test_a_step_is_held_to_its_memory(cluster, tmp_path):
    eat = f"{sys.executable} -c 'import time; held = bytearray(300 << 20); time.sleep(20)'"
    job = cluster.sbatch(f"srun {eat}; echo after", "--mem=100M", cwd=tmp_path)
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


def test_orphans_of_a_killed_session_are_stopped(tmp_path):
    owner = subprocess.Popen(["sleep", "100"])
    started = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[19]
    orphan = subprocess.Popen(["sleep", "100"], env={**os.environ, OWNER: f"{owner.pid}-{started}"})
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
