"""What the nodes of a partition have, and whether they could run a job."""

from __future__ import annotations

from pwm_torchrl.cluster import fits
from pwm_torchrl.cluster.query import nodes, partitions, slurm_config
from pwm_torchrl.cluster.resources import Resources
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.config import ClusterConfig


def node_memory_mb(partition: str | None) -> int:
    """Memory in MiB that every node of the partitions has, of SLURM's default partition for ``None``.

    Raises:
        SlurmError: if SLURM does not answer.
        ConfigurationError: if there are no such nodes.
    """
    names = partition.split(",") if partition else [each.name for each in partitions() if each.default]
    found = [node.memory_mb for node in nodes() if set(names) & set(node.partitions)]
    if not found:
        asked = f"cluster.partition={partition}" if partition else "a default partition"
        raise ConfigurationError(f"SLURM has no nodes in {asked}; set cluster.partition, or cluster.host_gb")
    return min(found)


def require_fit(cluster: ClusterConfig, resources: Resources) -> None:
    """Refuse what SLURM would accept and never run.

    Raises:
        ConfigurationError: with the key to change.
        SlurmError: if SLURM does not answer.
    """
    request = fits.Request.of(cluster, cpus=resources.cpus, memory_mb=resources.mem_mb, minutes=resources.time_min)
    reason = fits.misfit(request, slurm_config(), partitions(), nodes())
    if reason is not None:
        raise ConfigurationError(reason)
