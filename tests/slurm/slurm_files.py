"""Configuration files of a throw-away Slurm cluster: what its daemons read before they start."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

NULL_DEVICE = os.makedev(1, 3) if hasattr(os, "makedev") else 0
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Shape:
    """What a throw-away cluster pretends to have; its nodes share this machine.

    Attributes:
        nodes: virtual nodes, each with a slurmd of its own.
        cpus: CPUs per node, advertised; no job is pinned to one.
        memory_mb: memory per node, advertised; a job is held to what it asked for.
        gpus: GPUs per node, null devices; jobs get ``CUDA_VISIBLE_DEVICES``.
        gpu_type: their type.
        array_size: ``MaxArraySize``: the largest index of an array is one less.
        requeue_hold_s: seconds that a requeued job waits; 5 is the least that Slurm accepts.
        kill_wait_s: seconds between SIGTERM and SIGKILL.
        grace_s: seconds that a job of the partition ``low`` has when it is preempted.
        node_timeout_s: seconds after which a silent node is down.
        enforce: who holds jobs to their memory: ``cgroup`` (the kernel), ``poll`` (Slurm, once a second), or ``auto``.
    """

    nodes: int = 2
    cpus: int = 4
    memory_mb: int = 6000
    gpus: int = 2
    gpu_type: str = "l40s"
    array_size: int = 11
    requeue_hold_s: int = 5
    kill_wait_s: int = 8
    grace_s: int = 10
    node_timeout_s: int = 30
    enforce: str = "auto"

    def enforcement(self) -> str:
        """``cgroup`` or ``poll``."""
        if self.enforce != "auto":
            return self.enforce
        return "cgroup" if has_memory_cgroups() else "poll"


def has_memory_cgroups() -> bool:
    """Whether groups of version 1 can be made here; version 2 would need systemd in this Slurm."""
    for controller in ("memory", "freezer"):
        probe = CGROUPS / controller / f"slurm_probe_{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError:
            return False
    return (CGROUPS / "memory" / "memory.limit_in_bytes").exists()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def write_files(folder: Path, shape: Shape, nodes: list[str]) -> None:
    """Writes everything below ``folder``: configuration, key, null devices, empty folders."""
    for name in ("etc", "run", "state", "log", "dev", "bin", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
    etc = folder / "etc"
    (etc / "slurm.conf").write_text(slurm_conf(folder, shape, nodes, free_ports(1 + len(nodes))))
    (etc / "cgroup.conf").write_text(CGROUP_CONF)
    key = etc / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    if shape.gpus:
        for number in range(shape.gpus):
            device = folder / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(device, stat.S_IFCHR | 0o666, NULL_DEVICE)
        files = "gpu0" if shape.gpus == 1 else f"gpu[0-{shape.gpus - 1}]"
        (etc / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu Type={shape.gpu_type} File={folder / 'dev' / files}\n"
        )


def slurm_conf(folder: Path, shape: Shape, nodes: list[str], ports: list[int]) -> str:
    """Text of ``slurm.conf``."""
    run, log = folder / "run", folder / "log"
    host = socket.gethostname().split(".")[0]
    gres = f" Gres=gpu:{shape.gpu_type}:{shape.gpus}" if shape.gpus else ""
    controller, *others = ports
    lines = [
        "ClusterName=throwaway",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        # cred_expire is also how long a requeued job is held back.
        f"AuthInfo=socket={run / 'munge.socket'},cred_expire={shape.requeue_hold_s}",
        f"SlurmctldPidFile={run / 'slurmctld.pid'}",
        f"SlurmdPidFile={run / 'slurmd.%n.pid'}",
        f"SlurmctldLogFile={log / 'slurmctld.log'}",
        f"SlurmdLogFile={log / 'slurmd.%n.log'}",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder / 'spool' / '%n'}",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SlurmdParameters=config_overrides",  # nodes have what is written here, whatever this machine has
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=256",
        f"MaxArraySize={shape.array_size}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",  # --signal's signal at the start of the grace time
        "JobRequeue=1",
        f"KillWait={shape.kill_wait_s}",
        "MinJobAge=600",  # how long the controller remembers an ended job
        "InactiveLimit=0",
        f"SlurmdTimeout={shape.node_timeout_s}",
        "JobAcctGatherFrequency=task=1",
        *_enforcement(shape.enforcement()),
    ]
    if shape.gpus:
        lines.append("GresTypes=gpu")
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={shape.cpus} "
        f"RealMemory={shape.memory_mb}{gres} State=UNKNOWN"
        for node, port in zip(nodes, others, strict=True)
    ]
    common = f"Nodes={','.join(nodes)} MaxTime=1-00:00:00 DefaultTime=5 State=UP"
    lines += [
        f"PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF {common}",
        f"PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime={shape.grace_s} {common}",
        f"PartitionName=high PriorityTier=100 PreemptMode=OFF {common}",
    ]
    return "\n".join(lines) + "\n"


def _enforcement(by: str) -> list[str]:
    if by == "cgroup":
        return ["ProctrackType=proctrack/cgroup", "TaskPlugin=task/cgroup", "JobAcctGatherType=jobacct_gather/cgroup"]
    return [
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherParams=OverMemoryKill",
    ]


CGROUP_CONF = f"""CgroupPlugin=cgroup/v1
CgroupMountpoint={CGROUPS}
CgroupAutomount=no
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
AllowedRAMSpace=100
"""
