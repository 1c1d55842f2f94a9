"""What the doctor says of SLURM."""

from __future__ import annotations

import dataclasses

import pytest
from slurm_texts import SITE

from pwm_torchrl.cli import doctor as slurm_check
from pwm_torchrl.cli.doctor import OK, PROBLEM, WARNING, check_slurm
from pwm_torchrl.cluster.slurm import SlurmError
from pwm_torchrl.config import ClusterConfig

GPU = ClusterConfig(kind="slurm", name="mine", partition="gpu", gpu="l40s", gpus=4)


@pytest.fixture(autouse=True)
def _site(monkeypatch):
    monkeypatch.setattr(slurm_check, "site", lambda: SITE)


def test_a_cluster_and_a_profile_that_fits():
    cluster, main, gpu, old, accounting, profile = check_slurm(GPU, available=True)
    assert (
        cluster.text
        == "22.05.8, cluster throwaway: 4 of 6 nodes up, arrays of at most 11 jobs, a requeued job waits 5 s"
    )
    assert main.text == "partition main (default): 1 of 2 nodes up, up to 4 CPUs, 6 GiB, 1-00:00:00 at most"
    assert "2 of 3 nodes up, up to 96 CPUs, 1006 GiB, 4 l40s, 8 nvidia_h100_80gb_hbm3, no time limit" in gpu.text
    assert old.level == WARNING
    assert old.text.endswith("accepts no jobs now")
    assert accounting.level == OK
    assert "600 s" in accounting.text
    assert (profile.level, profile.text) == (OK, "cluster=mine fits partition gpu")


def test_a_profile_that_does_not_fit():
    *_, profile = check_slurm(dataclasses.replace(GPU, mem_gib=500), available=True)
    assert profile.level == PROBLEM
    assert profile.text.startswith("cluster=mine: 512000 MiB of host memory are more than")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host_gib": 2000}, "cluster.host_gib=2000 is more than a node has"),
        ({"gpu": "v100"}, "cluster.gpu=v100, but gpu has l40s, nvidia_h100_80gb_hbm3"),
    ],
)
def test_a_profile_of_other_nodes(changes, sentence):
    *_, doubt, profile = check_slurm(dataclasses.replace(GPU, **changes), available=True)
    assert (doubt.level, profile.level) == (WARNING, OK)
    assert sentence in doubt.text


@pytest.mark.parametrize("gpu", ["l40s", "h100", "h100-80gb", "H100"])
def test_sites_have_names_of_their_own_for_gpus(gpu):
    levels = [finding.level for finding in check_slurm(dataclasses.replace(GPU, gpu=gpu), available=True)]
    assert levels.count(WARNING) == 1  # the partition that is down


def test_no_profile_of_slurm_is_asked_for():
    findings = check_slurm(ClusterConfig(kind="local"), available=True)
    assert {finding.subject for finding in findings} == {"SLURM"}


def test_a_cluster_whose_nodes_are_all_down(monkeypatch):
    nodes = tuple(dataclasses.replace(node, state="DOWN") for node in SITE.nodes)
    monkeypatch.setattr(slurm_check, "site", lambda: dataclasses.replace(SITE, nodes=nodes))
    assert check_slurm(GPU, available=True)[0].level == PROBLEM


def test_no_answer(monkeypatch):
    def silent():
        raise SlurmError("SLURM did not answer")

    monkeypatch.setattr(slurm_check, "site", silent)
    (finding,) = check_slurm(GPU, available=True)
    assert (finding.level, finding.text) == (PROBLEM, "SLURM did not answer")


def test_no_slurm():
    (finding,) = check_slurm(ClusterConfig(kind="local"), available=False)
    assert finding.level == OK
    (finding,) = check_slurm(GPU, available=False)
    assert finding.level == PROBLEM
    assert "cluster=mine needs SLURM" in finding.text
