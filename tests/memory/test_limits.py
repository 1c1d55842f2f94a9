"""Budgets of this machine and of cluster profiles."""

from __future__ import annotations

import pytest
from training_cases import config

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory import plan as limits
from pwm_torchrl.memory.budget import Budget, Candidate
from pwm_torchrl.memory.predict import DEVICE, HOST
from pwm_torchrl.memory.readings import usable_gpu_bytes


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"):
        monkeypatch.delenv(name, raising=False)


class TestHere:
    def test_on_the_cpu_there_is_only_the_host(self):
        found = limits.budgets(config(), None)
        assert set(found) == {HOST}
        assert found[HOST].bytes > 0

    def test_configured_limit(self):
        assert limits.budgets(config({"memory.host_gib": 0.5}), None)[HOST].binding == Candidate(
            2**29, "memory.host_gib"
        )

    def test_configured_limit_above_the_machine(self):
        offered = limits.budgets(config(), None)[HOST]
        wished = limits.budgets(config({"memory.host_gib": 1e6}), None)[HOST]
        assert wished.source == offered.source != "memory.host_gib"

    def test_slurm_limit(self, monkeypatch):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
        assert limits.budgets(config(), None)[HOST].binding == Candidate(64 * 2**20, "SLURM_MEM_PER_NODE")

    def test_invalid_slurm_variable(self, monkeypatch):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", "much")
        with pytest.raises(ConfigurationError, match="SLURM_MEM_PER_NODE='much'"):
            limits.budgets(config(), None)

    def test_on_a_gpu_both_count(self, monkeypatch):
        asked = []

        def device_budget(gpu=None, *, device=None):
            asked.append(device)
            return Budget((Candidate(10**10, "free memory of a GPU"),))

        monkeypatch.setattr(limits, "device_budget", device_budget)
        found = limits.budgets(config({"memory.device_gib": 4}), "cuda:1")
        assert asked == ["cuda:1"]
        assert found[DEVICE].binding == Candidate(4 * 2**30, "memory.device_gib")
        assert limits.budgets(config(), "cuda")[DEVICE].source == "free memory of a GPU"


class TestElsewhere:
    @pytest.mark.parametrize("name", ["l40s", "h100", "h200"])
    def test_nodes_with_a_gpu(self, name):
        cfg = compose([f"cluster={name}"])
        found = limits.profile_budgets(cfg)
        assert found[HOST].binding == Candidate(int(cfg.cluster.host_gib * 2**30), f"cluster={name}")
        assert found[DEVICE].bytes == usable_gpu_bytes(name)
        assert name in found[DEVICE].source

    def test_nodes_without(self):
        assert set(limits.profile_budgets(compose(["cluster=cpu"]))) == {HOST}
        assert set(limits.profile_budgets(compose(["cluster=l40s", "device=cpu"]))) == {HOST}

    def test_profile_without_the_gpu(self):
        with pytest.raises(ConfigurationError, match=r"device=cuda.*cluster=cpu"):
            limits.profile_budgets(compose(["cluster=cpu", "device=cuda"]))

    def test_unknown_gpu_type(self):
        with pytest.raises(ConfigurationError, match=r"cluster\.gpu=h1000"):
            limits.profile_budgets(compose(["cluster=l40s", "cluster.gpu=h1000"]))

    def test_profile_without_memory(self):
        words = ["cluster.kind=slurm", "cluster.name=mine"]
        with pytest.raises(ConfigurationError, match=r"cluster=mine .*cluster\.host_gib"):
            limits.profile_budgets(compose(words))
        found = limits.profile_budgets(compose([*words, "memory.host_gib=3"]))
        assert found == {HOST: Budget((Candidate(3 * 2**30, "memory.host_gib"),))}

    def test_requested_memory_is_a_limit(self):
        assert limits.profile_budgets(compose(["cluster=l40s", "cluster.mem_gib=16"]))[HOST].binding == Candidate(
            16 * 2**30, "cluster.mem_gib"
        )
        words = ["cluster.kind=slurm", "cluster.name=mine", "cluster.mem_gib=2"]
        assert limits.profile_budgets(compose(words))[HOST].bytes == 2**31

    def test_this_machine_does_not_matter(self, monkeypatch):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
        assert limits.profile_budgets(compose(["cluster=h200"]))[HOST].bytes == 238 * 2**30

    def test_configured_limit(self):
        words = ["cluster=h200", "memory.host_gib=10", "memory.device_gib=20"]
        found = limits.profile_budgets(compose(words))
        assert {place: budget.bytes for place, budget in found.items()} == {HOST: 10 * 2**30, DEVICE: 20 * 2**30}
