"""What a cluster could never run, in one sentence with the key to change."""

from __future__ import annotations

import dataclasses

import pytest
from slurm_texts import SITE

from pwm_torchrl.cluster.resources import JobRequest, Resources, why_impossible
from pwm_torchrl.config import ClusterConfig


def l40s(count: int) -> tuple[tuple[str, int], ...]:
    return (("l40s", count),)


@pytest.mark.parametrize(
    "demand",
    [
        JobRequest(),
        JobRequest(cpus=4, memory_mb=6000, minutes=1440, nodes=2),
        JobRequest(partition="gpu", tasks=4, cpus=12, memory_mb=400000, minutes=10**6, gpus=l40s(4), nodes=2),
        JobRequest(partition="gpu", gpus=(("", 8),)),
        JobRequest(partition="gpu", gpus=(("nvidia_h100_80gb_hbm3", 8),), constraint="h100&ib"),
        JobRequest(partition="main,gpu", memory_mb=100_000),
        JobRequest(partition="gpu", constraint="[rack1|rack2]"),
    ],
    ids=str,
)
def test_what_fits(demand):
    assert why_impossible(demand, SITE) is None


@pytest.mark.parametrize(
    ("demand", "parts"),
    [
        (JobRequest(partition="gpus"), ["cluster.partition=gpus does not exist", "main, gpu, old"]),
        (JobRequest(partition="old"), ["partition old takes no jobs"]),
        (JobRequest(minutes=1441), ["1441 min", "partition main", "cluster.max_time_min=1440"]),
        (JobRequest(memory_mb=6001), ["6001 MiB", "6000 MiB", "cluster.mem_gib=5.85 or less", "cluster.host_gib=5.85"]),
        (JobRequest(partition="gpu", memory_mb=400_001), ["400000 MiB", "cluster.mem_gib=390.62 or less"]),
        (JobRequest(cpus=5), ["5 CPUs", "partition main has, 4", "cluster.cpus"]),
        (JobRequest(partition="gpu", tasks=8, cpus=7), ["8 tasks with 7 CPUs each", "allows on a node, 48"]),
        (JobRequest(partition="gpu", nodes=3), ["cluster.nodes=3", "allows, 2"]),
        (JobRequest(nodes=3), ["cluster.nodes=3", "only 2 of the 2 nodes"]),
        (JobRequest(gpus=(("", 1),)), ["1 GPU per node cannot be had", "partition main has none"]),
        (JobRequest(partition="gpu", gpus=l40s(5)), ["5 GPUs of type l40s per node", "at most 4"]),
        (JobRequest(partition="gpu", gpus=(("a100", 1),)), ["1 GPU of type a100 per node", "has none"]),
        (JobRequest(partition="gpu", constraint="v100"), ["cluster.constraint=v100", "h100, ib, l40s"]),
        (JobRequest(partition="gpu", gpus=(("", 8),), constraint="l40s"), ["only 0 of the 3 nodes", "at once"]),
        (JobRequest(partition="main,gpu", memory_mb=600_000), ["partition main"]),
    ],
    ids=str,
)
def test_what_could_never_run(demand, parts):
    sentence = why_impossible(demand, SITE)
    assert sentence is not None
    assert len(sentence.splitlines()) == 1
    for part in parts:
        assert part in sentence, sentence


def test_a_cluster_without_a_default_partition():
    partitions = tuple(dataclasses.replace(each, default=False) for each in SITE.partitions)
    site = dataclasses.replace(SITE, partitions=partitions)
    assert "set cluster.partition, one of main, gpu, old" in why_impossible(JobRequest(), site)


def test_a_limit_for_the_whole_cluster():
    site = dataclasses.replace(SITE, config=dataclasses.replace(SITE.config, max_memory_mb=1000))
    assert "1000 MiB" in why_impossible(JobRequest(memory_mb=2000), site)


def test_the_suggested_memory_fits():
    assert why_impossible(JobRequest(memory_mb=round(5.85 * 1024)), SITE) is None


def test_the_demand_of_a_profile():
    profile = ClusterConfig(kind="slurm", partition="gpu", gpu="l40s", gpus=2, time_min=3000, max_time_min=1440)
    assert JobRequest.of(profile) == JobRequest("gpu", tasks=2, gpus=(("", 2),), minutes=1440)
    profile = ClusterConfig(kind="slurm", gres="gpu:l40s:1,tmpfs:1", cpus=3, mem_gib=1.5, nodes=2)
    assert JobRequest.of(profile) == JobRequest(nodes=2, cpus=3, memory_mb=1536, gpus=l40s(1))


def test_what_a_run_asks_for_rules():
    profile = ClusterConfig(kind="slurm", partition="gpu", gpus=2, mem_gib=1, cpus=9, constraint="ib")
    request = Resources(mem_mb=9000, cpus=4, gpus=1, nodes=1, time_min=7)
    assert JobRequest.of(profile, request) == JobRequest(
        "gpu", cpus=4, memory_mb=9000, gpus=(("", 1),), minutes=7, constraint="ib"
    )
