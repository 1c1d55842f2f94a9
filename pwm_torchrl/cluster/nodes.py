"""What the nodes of a partition have, and whether they could run a job."""

from __future__ import annotations

from pwm_torchrl.cluster.fits import Demand, misfit
from pwm_torchrl.cluster.parse import Site
from pwm_torchrl.cluster.resources import Resources
from pwm_torchrl.config import ClusterConfig
from pwm_torchrl.errors import ConfigurationError


def node_memory_mb(partition: str | None, site: Site) -> int:
    """Memory in MiB that every node of the partitions has, of SLURM's default partition for ``None``.

    Raises:
        ConfigurationError: if there are no such nodes.
    """
    known = [each.name for each in site.partitions]
    for name in partition.split(",") if partition else []:
        if name not in known:
            raise ConfigurationError(f"cluster.partition={name} does not exist; choose one of {', '.join(known)}")
    names = partition.split(",") if partition else [each.name for each in site.partitions if each.default]
    found = [node.memory_mb for node in site.nodes if set(names) & set(node.partitions)]
    if not found:
        asked = f"cluster.partition={partition}" if partition else "a default partition"
        raise ConfigurationError(f"SLURM has no nodes in {asked}; set cluster.partition, or cluster.host_gb")
    return min(found)


def require_fit(cluster: ClusterConfig, resources: Resources, site: Site) -> None:
    """Refuse what SLURM would accept and never run.

    Raises:
        ConfigurationError: with the key to change.
    """
    reason = misfit(Demand.of(cluster, resources), site)
    if reason is not None:
        raise ConfigurationError(reason)
