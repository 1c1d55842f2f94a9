"""``launch/doctor.py`` on a real SLURM: a drafted profile fits, and what it asks for runs."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.doctor import OK, PROBLEM, check_slurm
from pwm_torchrl.cli.entry import run_command

main = partial(run_command, "doctor")


def test_a_draft_of_the_cluster(on_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    assert main(["--draft", "here", "cluster.partition=low"]) == 0
    profile = compose(["cluster=here"]).cluster
    assert (profile.kind, profile.partition, profile.gpu, profile.gpus) == ("slurm", "low", "l40s", 1)
    assert (profile.cpus, profile.host_gib, profile.max_time_min) == (2, 5.8, 1440)
    assert {finding.level for finding in check_slurm(profile, available=True)} == {OK}
    options = [f"--partition={profile.partition}", f"--gpus-per-node={profile.gpus}", f"--cpus-per-task={profile.cpus}"]
    options += [f"--mem={int(profile.host_gib * 1024)}M", f"--time={profile.max_time_min}"]
    job = on_cluster.sbatch("echo $CUDA_VISIBLE_DEVICES", *options, cwd=tmp_path)
    on_cluster.wait_state(job, {"COMPLETED"})
    assert (tmp_path / f"{job}.out").read_text() == "0\n"


def test_a_profile_for_another_cluster(on_cluster):
    profile = compose(["cluster=l40s", "cluster.partition=gpu"]).cluster
    *_, finding = check_slurm(profile, available=True)
    assert finding.level == PROBLEM
    assert finding.text == "cluster=l40s: cluster.partition=gpu does not exist; choose one of main, low, high"
