"""The run's memory budget and where it comes from."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cgroup_cases import limited_cgroup
from machine_cases import meminfo, process, v1_group, v2_group, write

from pwm_torchrl.memory.budget import Budget, Candidate, device_budget, host_budget
from pwm_torchrl.memory.readings import GIB, KIB, MIB, gpu_bytes, gpu_names, usable_gpu_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _no_ulimit(monkeypatch):
    """The budget as without ``ulimit -v``, which the shell of the tests may set."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("_no_ulimit")
class TestHost:
    def test_free_ram_and_what_the_run_holds(self, tmp_path):
        files = process(os.getpid(), 1, anon=100, shmem=20, file=900) | meminfo(10_000, 4_000)
        budget = host_budget(environ={}, root=write(tmp_path, files))
        assert budget.candidates == (Candidate(4_120 * KIB, "free RAM of this machine (9.77 MiB in total)"),)
        assert budget.bytes == 4_120 * KIB

    @pytest.mark.parametrize("version", [1, 2])
    def test_cgroup_limits_minus_other_processes(self, tmp_path, version):
        """This process holds 100 MiB, the inner group 110 MiB (noise), the outer group 500 MiB."""
        if version == 2:
            top = "sys/fs/cgroup"
            mount = f"41 31 0:38 / /{top} rw - cgroup2 cgroup2 rw\n"
            groups = v2_group(f"{top}/job", most=str(2 * GIB), anon=400 * MIB, shmem=100 * MIB, file=GIB)
            groups |= v2_group(f"{top}/job/step", high=str(3 * GIB), anon=110 * MIB, file=GIB)
            outer, inner = "memory.max", "memory.high"
        else:
            top = "sys/fs/cgroup/memory"
            mount = f"35 31 0:32 / /{top} rw - cgroup cgroup rw,memory\n"
            groups = v1_group(f"{top}/job", limit=2 * GIB, total_rss=400 * MIB, total_shmem=100 * MIB, total_cache=GIB)
            groups |= v1_group(f"{top}/job/step", limit=3 * GIB, total_rss=110 * MIB, total_cache=GIB)
            groups |= v1_group(top, total_rss=10 * GIB)
            outer = inner = "memory.limit_in_bytes"
        files = {"proc/self/cgroup": "0::/job/step\n4:memory:/job/step\n", "proc/self/mountinfo": mount, **groups}
        files |= process(os.getpid(), 1, anon=100 * 1024) | meminfo(64 * 2**20, 60 * 2**20)
        budget = host_budget(environ={}, root=write(tmp_path, files))
        assert [candidate.bytes for candidate in budget.candidates] == [
            3 * GIB,
            2 * GIB - 400 * MIB,
            60 * GIB + 100 * MIB,
        ]
        assert budget.bytes == 2 * GIB - 400 * MIB
        assert all(part in budget.source for part in (f"cgroup /job ({outer})", "2 GiB", "400 MiB"))
        assert f"cgroup /job/step ({inner})" in budget.candidates[0].source

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"SLURM_MEM_PER_NODE": "65536"}, 64 * GIB),
            ({"SLURM_MEM_PER_NODE": "64G"}, 64 * GIB),
            ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "8"}, 16 * GIB),
            ({"SLURM_MEM_PER_GPU": "32768", "SLURM_GPUS_ON_NODE": "2"}, 64 * GIB),
        ],
    )
    def test_slurm(self, tmp_path, environ, expected):
        budget = host_budget(environ=environ, root=write(tmp_path, meminfo(2**30, 2**30)))
        assert budget.bytes == expected
        assert next(iter(environ)) in budget.source
        assert len(budget.candidates) == 2

    @pytest.mark.parametrize(
        "environ", [{}, {"SLURM_MEM_PER_NODE": "0"}, {"SLURM_MEM_PER_NODE": ""}, {"SLURM_MEM_PER_CPU": "2048"}]
    )
    def test_slurm_values_that_are_no_limit(self, tmp_path, environ):
        budget = host_budget(environ=environ, root=write(tmp_path, meminfo(1000, 500)))
        assert [candidate.bytes for candidate in budget.candidates] == [500 * KIB]

    @pytest.mark.parametrize(
        ("name", "value"),
        [("SLURM_MEM_PER_NODE", "much"), ("SLURM_MEM_PER_CPU", "-1"), ("SLURM_CPUS_ON_NODE", "72(x2)")],
    )
    def test_invalid_slurm_values(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=name):
            host_budget(environ={name: value}, root=write(tmp_path, meminfo(1000, 500)))

    def test_the_environment_is_the_default(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
        assert host_budget(root=write(tmp_path, meminfo(10**6, 10**6))).bytes == MIB

    def test_without_proc_total_ram_is_used(self, tmp_path):
        budget = host_budget(environ={}, root=tmp_path)
        assert budget.bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert "total RAM" in budget.source

    def test_the_smallest_limit_is_the_budget(self):
        budget = Budget((Candidate(3, "three"), Candidate(-2, "overdrawn"), Candidate(-2, "the same")))
        assert (budget.bytes, budget.source) == (0, "overdrawn")
        with pytest.raises(ValueError, match=r"candidates=\(\)"):
            Budget(())


def test_address_space(tmp_path, monkeypatch):
    """Of 10 MiB of addresses, 400 KiB are used, 100 KiB of them for memory that counts."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10 * MIB, resource.RLIM_INFINITY))
    files = process(os.getpid(), 1, anon=100) | meminfo(10**6, 10**6)
    budget = host_budget(environ={}, root=write(tmp_path, files))
    assert budget.bytes == 10 * MIB - 300 * KIB
    assert "ulimit -v" in budget.source


def test_in_a_real_group():
    """The budget of a process in a group of 300 MiB in which another one holds 64 MiB."""
    code = """
import os, sys
from pathlib import Path
procs = Path(sys.argv[1]) / "cgroup.procs"
if len(sys.argv) == 3:
    procs.write_text(str(os.getpid()))
    block = b"x" * 2**26
    print("ready", flush=True)
    sys.stdin.readline()
else:
    procs.write_text(str(os.getpid()))
    from pwm_torchrl.memory.budget import host_budget
    budget = host_budget(environ={})
    print(budget.bytes, budget.source)
"""
    command = [sys.executable, "-c", code]
    with limited_cgroup(300 * MIB) as directory:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([*command, directory, "other"], text=True, cwd=ROOT, **pipes) as other:
            assert other.stdout.readline() == "ready\n"
            out = subprocess.run([*command, directory], capture_output=True, text=True, check=True, cwd=ROOT).stdout
            other.communicate("\n")
    count, _, source = out.partition(" ")
    # Memory that the process held before it joined the group is not charged to the group.
    assert 225 * MIB < int(count) < 250 * MIB
    assert source.startswith("limit of cgroup ")
    assert "300 MiB, minus " in source


class TestGpuTypes:
    @pytest.mark.parametrize(
        ("name", "mib"),
        [
            ("l40s", 46068),
            ("L40S", 46068),
            ("NVIDIA L40S", 46068),
            ("l40s-48gb", 46068),
            ("h100", 81559),
            ("NVIDIA H100 80GB HBM3", 81559),
            ("nvidia_h100_nvl_94gb", 95830),
            ("h200", 143771),
            ("a100", 40960),  # the smaller of two
            ("a100_80gb", 81920),
            ("NVIDIA A100-SXM4-80GB", 81920),
            ("A100 40G", 40960),
            ("v100", 16384),
            ("Tesla V100-SXM2-32GB", 32768),
            ("rtx4090", 24564),
            ("NVIDIA GeForce RTX 4090", 24564),
            ("rtx_3090", 24576),
            ("rtx_2080_ti", 11264),
            ("RTX A6000", 49140),
            ("NVIDIA RTX 6000 Ada Generation", 46068),
            ("Tesla T4", 15360),
        ],
    )
    def test_known(self, name, mib):
        assert gpu_bytes(name) == mib * MIB

    @pytest.mark.parametrize("name", gpu_names())
    def test_every_name_listed_is_known(self, name):
        assert usable_gpu_bytes(name) <= gpu_bytes(name) - GIB

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("l40x", "l40s"), ("a100-48gb", "a100-40gb"), ("h100-80gb-40gb", "h100-80gb"), ("", "known: "), ("xyz", "t4")],
    )
    def test_unknown_with_the_nearest(self, name, nearest):
        with pytest.raises(ValueError, match="unknown GPU type") as caught:
            gpu_bytes(name)
        assert nearest in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "seen_gib"), [("l40s", 44.40), ("l4", 22.03), ("rtx4090", 23.52), ("t4", 14.58), ("b200", 178.35)]
    )
    def test_usable_memory_excludes_a_context(self, name, seen_gib):
        """Below the total in PyTorch's out-of-memory messages by at least 300 MiB."""
        assert usable_gpu_bytes(name) <= seen_gib * GIB - 300 * MIB


class TestDevice:
    def test_of_a_gpu_type(self):
        budget = device_budget("l40s")
        assert budget.bytes == usable_gpu_bytes("l40s")
        assert "a l40s" in budget.source
        with pytest.raises(ValueError, match="unknown GPU type"):
            device_budget("l40x")

    def test_of_the_device(self, monkeypatch):
        """Free memory and what this process has reserved, as on a GPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {1: (10 * GIB, 24 * GIB)}[device])
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {1: 2 * GIB}[device])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {1: "Some GPU"}[device])
        budget = device_budget(device=1)
        assert (budget.bytes, budget.source) == (12 * GIB, "free memory of Some GPU (24 GiB in total)")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_device(self):
        assert device_budget() is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_of_a_real_device(self):
        before = device_budget(device="cuda")
        block = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
        after = device_budget(device="cuda")
        total = torch.cuda.get_device_properties("cuda").total_memory
        assert 0 < before.bytes <= total
        # An allocation of this process does not change its budget, apart from other processes on the device.
        assert abs(after.bytes - before.bytes) < 2**27
        assert block.numel() == 2**28
