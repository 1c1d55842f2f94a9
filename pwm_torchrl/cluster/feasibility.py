"""Whether a cluster could ever run a job: much of what is too large SLURM accepts and lets wait for ever.

``sbatch --test-only`` does not tell (tried with SLURM 22.05 and its default settings): it accepts a time limit beyond
the partition's and a partition that is down, says "Requested node configuration is not available" alike of too much
memory, too many CPUs, GPUs or nodes and of an unknown type of GPU, and says so too while all nodes are drained, which
passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pwm_torchrl.cluster.slurm import Node, Partition, Site, SlurmConfig, parse_gpus
from pwm_torchrl.config import ClusterConfig

if TYPE_CHECKING:
    from pwm_torchrl.cluster.resources import Resources

__all__ = ["JobRequest", "why_impossible"]


@dataclass(frozen=True)
class JobRequest:
    """What a job asks for; ``None`` stands for what is not said.

    Attributes:
        partition: names separated by commas; ``None``: the default one.
        nodes: number of nodes.
        tasks: tasks per node.
        cpus: CPUs per task.
        memory_mb: memory per node, MiB.
        gpus: GPUs per node, by type; the type ``""`` is any.
        minutes: time limit.
        constraint: features of nodes; only a single one, or several joined by ``&``, is checked.
    """

    partition: str | None = None
    nodes: int = 1
    tasks: int = 1
    cpus: int | None = None
    memory_mb: int | None = None
    gpus: tuple[tuple[str, int], ...] = ()
    minutes: int | None = None
    constraint: str | None = None

    @classmethod
    def of(cls, profile: ClusterConfig, resources: Resources | None = None) -> JobRequest:
        """Of a profile, and of a run's resources where there are any, which say what the profile leaves open."""
        gpus = profile.gpus if resources is None else resources.gpus
        kinds = parse_gpus(profile.gres) if profile.gres is not None else {"": gpus}
        memory_mb = None if profile.mem_gib is None else round(profile.mem_gib * 1024)
        minutes = [m for m in (profile.time_min, profile.max_time_min) if m is not None]
        return cls(
            partition=profile.partition,
            nodes=profile.nodes if resources is None else resources.nodes,
            tasks=max(1, gpus),
            cpus=profile.cpus if resources is None else resources.cpus,
            memory_mb=memory_mb if resources is None else resources.mem_mb,
            gpus=tuple((kind, count) for kind, count in kinds.items() if count),
            minutes=min(minutes, default=None) if resources is None else resources.time_min,
            constraint=profile.constraint,
        )


def why_impossible(request: JobRequest, site: Site) -> str | None:
    """Why no node of the asked partitions could ever run the job: a sentence with the key to change.

    Of several partitions one that fits is enough.

    Args:
        request (JobRequest): what is asked.
        site (Site): what there is.

    Returns:
        str, optional: ``None`` if the job can run.
    """
    partitions = site.partitions
    names = request.partition.split(",") if request.partition else [p.name for p in partitions if p.default]
    if not names:
        return f"SLURM has no default partition; set cluster.partition, one of {', '.join(p.name for p in partitions)}"
    reason = None
    for name in names:
        partition = next((p for p in partitions if p.name == name), None)
        if partition is None:
            return f"cluster.partition={name} does not exist; choose one of {', '.join(p.name for p in partitions)}"
        here = [node for node in site.nodes if name in node.partitions]
        found = _beyond_limits(request, site.config, partition) or _beyond_nodes(request, partition, here)
        if found is None:
            return None
        reason = reason or found
    return reason


def _beyond_limits(request: JobRequest, config: SlurmConfig, partition: Partition) -> str | None:
    """What a partition's own limits forbid."""
    where = f"partition {partition.name}"
    if not partition.up:
        return f"{where} takes no jobs now; set cluster.partition to another one"
    if _exceeds(request.minutes, partition.max_minutes):
        return (
            f"a time limit of {request.minutes} min is longer than {where} allows, {partition.max_minutes} min; set "
            f"cluster.max_time_min={partition.max_minutes}, and longer runs come back until they are done"
        )
    if _exceeds(request.nodes, partition.max_nodes):
        return f"cluster.nodes={request.nodes} is more than {where} allows, {partition.max_nodes}"
    cpus = request.tasks * (request.cpus or 1)
    if _exceeds(cpus, partition.max_cpus):
        return f"{_cpus(request)} are more than {where} allows on a node, {partition.max_cpus}; lower cluster.cpus"
    most = min((m for m in (partition.max_memory_mb, config.max_memory_mb) if m is not None), default=None)
    if _exceeds(request.memory_mb, most):
        return _too_much_memory(request, where, most or 0)
    return None


def _beyond_nodes(request: JobRequest, partition: Partition, nodes: Sequence[Node]) -> str | None:
    """What its nodes do not have, each thing alone and then all together."""
    where = f"partition {partition.name}"
    if not nodes:
        return f"{where} has no nodes; set cluster.partition to another one"
    cpus = request.tasks * (request.cpus or 1)
    most_cpus = max(node.cpus for node in nodes)
    if cpus > most_cpus:
        return f"{_cpus(request)} are more than a node of {where} has, {most_cpus}; lower cluster.cpus"
    most_memory = max(node.memory_mb for node in nodes)
    if _exceeds(request.memory_mb, most_memory):
        return _too_much_memory(request, where, most_memory)
    for kind, count in request.gpus:
        most = max(_gpus(node, kind) for node in nodes)
        if count > most:
            asked = "1 GPU" if count == 1 else f"{count} GPUs"
            return (
                f"{asked}{f' of type {kind}' if kind else ''} per node cannot be had, a node of {where} has "
                f"{f'at most {most}' if most else 'none'}; change cluster.gpus, cluster.gres or cluster.partition"
            )
    features = [name for name in (request.constraint or "").split("&") if name.replace("_", "").isalnum()]
    for name in features:
        if not any(name in node.features for node in nodes):
            known = sorted({feature for node in nodes for feature in node.features})
            return (
                f"cluster.constraint={request.constraint}: no node of {where} has the feature {name}; "
                f"{'they have ' + ', '.join(known) if known else 'they have none'}"
            )
    wanted: list[Callable[[Node], bool]] = [
        lambda node: node.cpus >= cpus,
        lambda node: not _exceeds(request.memory_mb, node.memory_mb),
        lambda node: all(_gpus(node, kind) >= count for kind, count in request.gpus),
        lambda node: set(features) <= set(node.features),
    ]
    able = [node for node in nodes if all(has(node) for has in wanted)]
    if len(able) < request.nodes:
        return (
            f"cluster.nodes={request.nodes}: only {len(able)} of the {len(nodes)} nodes of {where} have all of what is "
            "asked at once; lower cluster.nodes, cluster.cpus, cluster.mem_gib or cluster.gpus"
        )
    return None


def _too_much_memory(request: JobRequest, where: str, most: int) -> str:
    gib = math.floor(most / 1024 * 100) / 100
    return (
        f"{request.memory_mb} MiB of host memory are more than a job may have on a node of {where}, {most} MiB; set "
        f"cluster.mem_gib={gib:g} or less, or cluster.host_gib={gib:g} for a plan that fits"
    )


def _cpus(request: JobRequest) -> str:
    each = request.cpus or 1
    return f"{each} CPUs" if request.tasks == 1 else f"{request.tasks} tasks with {each} CPUs each"


def _gpus(node: Node, kind: str) -> int:
    return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())


def _exceeds(asked: int | None, most: int | None) -> bool:
    return asked is not None and most is not None and asked > most
