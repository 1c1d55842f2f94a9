"""A profile drafted from what SLURM says."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest

pytest.importorskip("hydra")

from slurm_texts import SITE

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.doctor import draft_profile, profile_file, write_profile
from pwm_torchrl.cluster.resources import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Node, Partition
from pwm_torchrl.errors import ConfigurationError


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Writes a profile named ``mine`` and composes it."""
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path / "own"))

    def write_and_compose(text: str, *words: str):
        write_profile(profile_file("mine"), text, force=True)
        return compose(["cluster=mine", *words]).cluster

    return write_and_compose


def test_a_partition_with_gpus(composed):
    text = draft_profile("mine", SITE, "gpu", date(2026, 11, 25))
    assert text.startswith(
        "# Partition gpu of cluster throwaway, drafted by `launch/doctor.py --draft mine` on 2026-11-25"
    )
    assert "Other partitions: main, old" in text
    assert max(map(len, text.splitlines())) <= 120
    cluster = composed(text)
    # Most nodes have L40S; a job may have 400,000 MiB on each, and an L40S's share is 16 of 64 CPUs.
    assert (cluster.kind, cluster.name, cluster.partition) == ("slurm", "mine", "gpu")
    assert (cluster.gpu, cluster.gpus, cluster.gres) == ("l40s", 1, "gpu:l40s:1")
    assert (cluster.host_gib, cluster.cpus, cluster.max_time_min) == (390.6, 16, None)
    assert why_impossible(JobRequest.of(cluster), SITE) is None


def test_the_default_partition_without_gpus(composed):
    cluster = composed(draft_profile("mine", SITE, None))
    assert (cluster.partition, cluster.gpu, cluster.gpus, cluster.gres) == ("main", None, 0, None)
    assert (cluster.host_gib, cluster.cpus, cluster.max_time_min) == (5.8, None, 1440)
    assert why_impossible(JobRequest.of(cluster), SITE) is None


def test_gpus_without_a_name_are_asked_for(composed):
    text = draft_profile("mine", SITE, "old")
    with pytest.raises(ConfigurationError, match=r"set cluster\.gpu, such as cluster\.gpu=l40s"):
        composed(text)
    assert composed(text, "cluster.gpu=a100-80gb").gpus == 1


def test_a_name_that_is_no_known_type(composed):
    nodes = (Node("x", cpus=8, memory_mb=1000, gpus={"fancy": 2}, partitions=("main",)),)
    text = draft_profile("mine", dataclasses.replace(SITE, nodes=nodes), None)
    assert "SLURM calls it fancy" in text
    assert composed(text, "cluster.gpu=l40s").cpus == 4


@pytest.mark.parametrize(
    ("site", "partition", "sentence"),
    [
        (SITE, "gpus", "cluster.partition=gpus does not exist; choose one of main, gpu, old"),
        (dataclasses.replace(SITE, nodes=()), "gpu", "partition gpu has no nodes"),
        (
            dataclasses.replace(SITE, partitions=(Partition("a"), Partition("b"))),
            None,
            r"no default partition; name one, cluster\.partition=\.\.\., of a, b",
        ),
    ],
)
def test_what_cannot_be_drafted(site, partition, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        draft_profile("mine", site, partition)


def test_a_profile_is_never_written_over_unasked(tmp_path):
    file = tmp_path / "cluster" / "mine.yaml"
    write_profile(file, "a", force=False)
    with pytest.raises(ConfigurationError, match="exists; --force writes over it"):
        write_profile(file, "b", force=False)
    assert file.read_text() == "a"
    write_profile(file, "b", force=True)
    assert file.read_text() == "b"
    with pytest.raises(ConfigurationError, match="cannot be written: Not a directory"):
        write_profile(file / "under" / "a_file.yaml", "c", force=False)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_names_that_cannot_be(name):
    with pytest.raises(ConfigurationError, match="is not a name"):
        profile_file(name)


def test_packaged_names_are_taken():
    with pytest.raises(ConfigurationError, match="such as my_l40s"):
        profile_file("l40s")
