"""Limits and usage of control groups of version 1, version 2 and both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cgroup_cases import limited_cgroup
from machine_cases import UNLIMITED_V1, v1_group, v2_group, write

from pwm_torchrl.memory.cgroups import memory_cgroups, tightest
from pwm_torchrl.memory.readings import GIB, MIB

V1_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V1_CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup{below} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
STAT_V1 = {"cache": 1, "rss": 1, "total_cache": 50, "total_rss": 100, "total_shmem": 20, "total_dirty": 5}
STAT_V2 = {"anon": 100, "file": 50, "shmem": 20, "file_dirty": 5, "file_writeback": 2, "slab": 9}


def machine(root: Path, membership: str, mounts: str, *groups: dict[str, str]) -> Path:
    write(root, {"proc/self/cgroup": membership, "proc/self/mountinfo": OTHER + mounts})
    for group in groups:
        write(root, group)
    return root


def test_version_2_walks_up_to_the_root(tmp_path):
    top = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        "0::/slurm/job_1/step_0\n",
        V2_MOUNT.format(below=""),
        {f"{top}/memory.stat": "anon 1000\n", f"{top}/cgroup.controllers": "memory"},  # the root has no memory.current
        v2_group(f"{top}/slurm", usage=400, anon=300),
        v2_group(f"{top}/slurm/job_1", most=str(8 * GIB), high=str(7 * GIB), usage=300, **STAT_V2),
        v2_group(f"{top}/slurm/job_1/step_0", usage=200, **STAT_V2),
    )
    step, job, slurm = memory_cgroups(root)
    assert [group.name for group in (step, job, slurm)] == ["/slurm/job_1/step_0", "/slurm/job_1", "/slurm"]
    assert [group.limit for group in (step, job, slurm)] == [None, 7 * GIB, None]
    assert job.limit_file == "memory.high"
    assert tightest((step, job, slurm)) is job
    assert (job.usage, job.anon, job.shmem, job.file, job.dirty, job.writeback) == (300, 100, 20, 50, 5, 2)
    assert job.unreclaimable == 100 + 20 + 5 + 2  # shared memory is a part of the file memory, and counts once
    assert (job.held, job.unwritten) == (120, 7)


def test_a_group_without_the_memory_controller_is_skipped(tmp_path):
    root = machine(
        tmp_path,
        "0::/user/session\n",
        V2_MOUNT.format(below=""),
        v2_group("sys/fs/cgroup/user", most=str(GIB), usage=7, **STAT_V2),
        {"sys/fs/cgroup/user/session/cgroup.procs": "1\n"},
    )
    (user,) = memory_cgroups(root)
    assert (user.name, user.limit, user.limit_file) == ("/user", GIB, "memory.max")


def test_version_1(tmp_path):
    top = "sys/fs/cgroup/memory"
    root = machine(
        tmp_path,
        "5:cpu,cpuacct:/elsewhere\n4:memory:/slurm/job_1\n",
        V1_CPU_MOUNT + V1_MOUNT.format(shown="/"),
        v1_group(top, usage=900, total_rss=800, hierarchical_memory_limit=UNLIMITED_V1),
        v1_group(f"{top}/slurm", limit=4 * GIB, usage=500, total_rss=400),
        v1_group(
            f"{top}/slurm/job_1", limit=9223372036854710272, usage=200, total_writeback=2, **STAT_V1
        ),  # 64 KiB pages
    )
    job, slurm, outermost = memory_cgroups(root)
    assert (job.limit, slurm.limit, outermost.limit) == (None, 4 * GIB, None)
    assert (job.name, outermost.name) == ("/slurm/job_1", "/")
    assert (job.version, job.usage, job.unreclaimable) == (1, 200, 100 + 20 + 5 + 2)
    assert tightest((job, slurm, outermost)) is slurm


def test_without_hierarchy_outer_groups_are_ignored(tmp_path):
    top = "sys/fs/cgroup/memory"
    root = machine(
        tmp_path,
        "4:memory:/job\n",
        V1_MOUNT.format(shown="/"),
        v1_group(top, limit=MIB, hierarchy="0", total_rss=1),
        v1_group(f"{top}/job", limit=GIB, total_rss=1),
    )
    assert [group.limit for group in memory_cgroups(root)] == [GIB]


@pytest.mark.parametrize(
    ("membership", "mounts", "version"),
    [
        # the memory controller of version 1 beside an empty version 2, as here and on older systemd
        ("4:memory:/job\n0::/\n", V1_MOUNT.format(shown="/") + V2_MOUNT.format(below="/unified"), 1),
        # version 2 has the memory controller, version 1 some others
        ("3:cpu:/job\n0::/job\n", V1_CPU_MOUNT + V2_MOUNT.format(below="/unified"), 2),
        # listed, but not mounted in this container
        ("4:memory:/job\n0::/job\n", V1_CPU_MOUNT + V2_MOUNT.format(below="/unified"), 2),
    ],
)
def test_hybrid(tmp_path, membership, mounts, version):
    groups = [v1_group("sys/fs/cgroup/memory/job", limit=GIB, **STAT_V1)] if version == 1 else []
    if version == 1:
        groups.append(v1_group("sys/fs/cgroup/memory", **STAT_V1))
        groups.append({"sys/fs/cgroup/unified/cgroup.controllers": ""})
    else:
        groups.append(v2_group("sys/fs/cgroup/unified/job", most=str(GIB), **STAT_V2))
    found = memory_cgroups(machine(tmp_path, membership, mounts, *groups))
    assert (found[0].version, found[0].name, found[0].limit) == (version, "/job", GIB)


class TestContainers:
    """/proc may report a path outside of the mount."""

    @pytest.mark.parametrize("path", ["/docker/abc", "/../../system.slice/x", "/"])
    def test_the_mount_is_the_group(self, tmp_path, path):
        root = machine(
            tmp_path,
            f"4:memory:{path}\n",
            V1_MOUNT.format(shown="/docker/def" if path == "/docker/abc" else "/"),
            v1_group("sys/fs/cgroup/memory", limit=GIB, usage=5, **STAT_V1),
        )
        (group,) = memory_cgroups(root)
        assert (group.name, group.limit, group.usage) == ("/", GIB, 5)

    def test_a_group_below_the_one_that_is_mounted(self, tmp_path):
        root = machine(
            tmp_path,
            "4:memory:/docker/abc/inner\n",
            V1_MOUNT.format(shown="/docker/abc"),
            v1_group("sys/fs/cgroup/memory", limit=GIB, **STAT_V1),
            v1_group("sys/fs/cgroup/memory/inner", limit=MIB, **STAT_V1),
        )
        assert [(group.name, group.limit) for group in memory_cgroups(root)] == [("/inner", MIB), ("/", GIB)]

    def test_a_limit_above_the_mount_is_known_in_version_1(self, tmp_path):
        root = machine(
            tmp_path,
            "4:memory:/docker/abc\n",
            V1_MOUNT.format(shown="/docker/abc"),
            v1_group("sys/fs/cgroup/memory", hierarchical_memory_limit=2 * GIB, **STAT_V1),
        )
        (group,) = memory_cgroups(root)
        assert (group.limit, group.limit_file) == (2 * GIB, "memory.stat")

    def test_a_mount_point_with_a_space(self, tmp_path):
        mount = V2_MOUNT.format(below="").replace("/sys/fs/cgroup", r"/my\040groups")
        root = machine(tmp_path, "0::/job\n", mount, v2_group("my groups/job", most="4096", **STAT_V2))
        assert memory_cgroups(root)[0].limit == 4096


def test_a_kernel_that_does_not_split_the_usage(tmp_path):
    files = v2_group("sys/fs/cgroup/job", most="4096", usage=100)
    del files["sys/fs/cgroup/job/memory.stat"]
    (group,) = memory_cgroups(machine(tmp_path, "0::/job\n", V2_MOUNT.format(below=""), files))
    assert (group.limit, group.usage) == (4096, 100)
    assert group.unreclaimable is group.held is group.unwritten is None


def test_no_cgroups(tmp_path):
    assert memory_cgroups(tmp_path) == ()
    assert memory_cgroups(machine(tmp_path, "0::/\n", V2_MOUNT.format(below=""))) == ()
    assert tightest(()) is None


def test_a_damaged_file_is_an_error(tmp_path):
    files = v2_group("sys/fs/cgroup/job", most="much", **STAT_V2)
    with pytest.raises(ValueError, match="much"):
        memory_cgroups(machine(tmp_path, "0::/job\n", V2_MOUNT.format(below=""), files))


def test_a_real_group():
    """A process in a new group reads its limit and its own memory."""
    code = """
import os, sys
from pathlib import Path
directory = Path(sys.argv[1])
(directory / "cgroup.procs").write_text(str(os.getpid()))
from pwm_torchrl.memory.cgroups import memory_cgroups
before = memory_cgroups()[0]
block = b"x" * 2**26
group = memory_cgroups()[0]
print(group.path == directory, group.limit, group.anon - before.anon, group.usage)
"""
    with limited_cgroup(200 * MIB) as directory:
        out = subprocess.run(
            [sys.executable, "-c", code, directory],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    same, limit, grown, usage = out.stdout.split()
    assert same == "True"
    assert int(limit) == 200 * MIB
    assert 60 * MIB < int(grown) < 72 * MIB
    assert int(usage) >= int(grown)
    assert not directory.exists()
