"""What SLURM has, and whether a cluster profile fits it."""

from __future__ import annotations

import math

from pwm_torchrl.cluster.fits import Demand, misfit
from pwm_torchrl.cluster.slurm import Partition, Site, SlurmError, from_minutes, site
from pwm_torchrl.config import ClusterConfig
from pwm_torchrl.launch.checks import OK, PROBLEM, WARNING, Finding
from pwm_torchrl.memory.readings import gpu_bytes

__all__ = ["check_slurm"]

_SUBJECT = "SLURM"


def check_slurm(profile: ClusterConfig, *, available: bool) -> list[Finding]:
    """The cluster, each of its partitions, and the profile against them.

    Args:
        profile (ClusterConfig): what jobs would ask for.
        available (bool): whether this machine belongs to a cluster.
    """
    if not available:
        if profile.kind == "slurm":
            text = f"cluster={profile.name} needs it, and this machine belongs to no cluster; choose cluster=local"
            return [Finding(PROBLEM, _SUBJECT, text)]
        return [Finding(OK, _SUBJECT, "not here; jobs run on this machine")]
    try:
        here = site()
    except SlurmError as error:
        return [Finding(PROBLEM, _SUBJECT, str(error))]
    findings = [_cluster(here), *(_partition(here, partition) for partition in here.partitions)]
    if not here.config.accounting:
        text = (
            f"no accounting: it forgets an ended job after {here.config.remembers_s} s; how runs ended is read in "
            "their own directories"
        )
        findings.append(Finding(OK, _SUBJECT, text))
    if profile.kind in ("slurm", "auto"):
        findings += [
            Finding(WARNING, "profile", f"cluster={profile.name}: {doubt}") for doubt in _doubts(profile, here)
        ]
        reason = misfit(Demand.of(profile), here)
        label = f"cluster={profile.name}"
        if reason is not None:
            findings.append(Finding(PROBLEM, "profile", f"{label}: {reason}"))
        else:
            findings.append(Finding(OK, "profile", f"{label} fits {_partition_of(profile, here)}"))
    return findings


def _doubts(profile: ClusterConfig, here: Site) -> list[str]:
    """Where a profile describes other nodes than its partition has: memory plans would be made for those."""
    names = profile.partition.split(",") if profile.partition else [p.name for p in here.partitions if p.default]
    nodes = [node for node in here.nodes if set(names) & set(node.partitions)]
    if not nodes:
        return []
    doubts = []
    most = max(node.memory_mb for node in nodes) * 2**20 / 1e9
    if profile.host_gb is not None and profile.host_gb > most:
        doubts.append(
            f"cluster.host_gb={profile.host_gb:g} is more than a node has, so that plans may ask for too much; set "
            f"cluster.host_gb={math.floor(most * 10) / 10:g}"
        )
    kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
    if profile.gpu is not None and kinds and not any(_same_gpu(profile.gpu, kind) for kind in kinds):
        doubts.append(
            f"cluster.gpu={profile.gpu} is planned with, but {', '.join(names)} has {', '.join(kinds)}; set cluster.gpu"
        )
    return doubts


def _same_gpu(name: str, kind: str) -> bool:
    """Whether a type of ours may be one of SLURM's, of which each site has its own names."""
    try:
        return gpu_bytes(name) == gpu_bytes(kind)
    except ValueError:
        return name.lower() in kind.lower()


def _cluster(here: Site) -> Finding:
    config = here.config
    up = sum(node.up for node in here.nodes)
    text = (
        f"{config.version}, cluster {config.cluster}: {up} of {len(here.nodes)} nodes up, arrays of "
        f"{config.max_array_size} at most, a requeued job waits {config.requeue_hold_s} s"
    )
    return Finding(OK if up else PROBLEM, _SUBJECT, text)


def _partition(here: Site, partition: Partition) -> Finding:
    nodes = [node for node in here.nodes if partition.name in node.partitions]
    up = [node for node in nodes if node.up]
    gpus: dict[str, int] = {}
    for node in nodes:
        for kind, count in node.gpus.items():
            gpus[kind or "GPU"] = max(count, gpus.get(kind or "GPU", 0))
    parts = [f"{len(up)} of {len(nodes)} nodes up"]
    if nodes:
        parts += [f"up to {max(n.cpus for n in nodes)} CPUs", f"{max(n.memory_mb for n in nodes) / 1024:.0f} GiB"]
    parts += [f"{count} {kind}" for kind, count in gpus.items()]
    parts.append("no time limit" if partition.max_minutes is None else f"{from_minutes(partition.max_minutes)} at most")
    name = f"partition {partition.name}{' (default)' if partition.default else ''}"
    level = OK if partition.up and up else WARNING
    return Finding(level, _SUBJECT, f"{name}: {', '.join(parts)}{'' if partition.up else '; takes no jobs now'}")


def _partition_of(profile: ClusterConfig, here: Site) -> str:
    if profile.partition:
        return f"partition {profile.partition}"
    return f"the default partition, {', '.join(p.name for p in here.partitions if p.default)}"
