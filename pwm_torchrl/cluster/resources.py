"""The resources that a run requests from SLURM: memory, CPUs, GPUs and a time limit, checked against the nodes.

A job that reaches its time limit saves a checkpoint and is requeued. An estimate that is too short costs a restart, and
one that is too long costs queue priority; nothing else depends on it.

Requests that no node could ever satisfy are rejected here, because SLURM accepts many of them and lets the job wait
forever. ``sbatch --test-only`` does not find them (tested with SLURM 22.05 and its default settings): it accepts a time
limit beyond the partition's and a partition that is down. It reports "Requested node configuration is not available"
alike for too much memory, too many CPUs, GPUs or nodes, an unknown type of GPU, and while all nodes are drained, which
is temporary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pwm_torchrl.cluster.slurm import Node, Partition, Site, SlurmConfig, parse_gpus, to_minutes
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.memory.plan import Plan

__all__ = [
    "JobRequest",
    "Resources",
    "estimated_minutes",
    "node_memory_mb",
    "require_fit",
    "resources_again",
    "resources_for",
    "sbatch_options",
    "sbatch_parameters",
    "take_variables",
    "why_impossible",
]

# Estimated time limit -------------------------------------------------------------------------------------------------


#: Estimated floating-point operations per second of small matrix products, per CPU core and per GPU.
CPU_FLOPS, GPU_FLOPS = 5e9, 8e12
#: Seconds of overhead in an update per network evaluation of the rollout, for launching kernels.
LAUNCH_OVERHEAD_S = 4e-4
#: Agent steps per second of one environment on one core, for a slow simulator with TorchRL's overhead.
ENV_STEPS_PER_S = 500.0
#: Factor on the estimate, minutes added for start-up, and the smallest time limit in minutes.
SAFETY, START_UP_MIN, LEAST_MIN = 3.0, 15, 30


def estimated_minutes(cfg: Config, plan: Plan, cpus: int) -> int:
    """Estimated time limit for the whole run, in minutes."""
    a, t = cfg.algorithm, cfg.training
    made = plan.prediction.updates
    on_gpu = plan.prediction.compute == "device"
    arithmetic = plan.prediction.operations / (GPU_FLOPS if on_gpu else CPU_FLOPS * cpus)
    steps = sum(update.per_epoch * update.steps for update in made if update.name != "critic")
    # The dynamics and two other networks per step: forward and backward, and forward again if that is recomputed.
    calls = (plan.prediction.evaluations + 2 * steps) * (4 if plan.choices.checkpoint_substeps else 3)
    critics = sum(update.per_epoch for update in made if update.name == "critic") * 6
    envs = int(cfg.env.get("num_envs", 1)) if cfg.mode == "online" else 0
    collection = envs * a.steps_per_env / ENV_STEPS_PER_S
    epoch_s = arithmetic + (calls + critics) * LAUNCH_OVERHEAD_S + collection
    evaluation_s = int(cfg.env.get("episode_length") or 1000) * t.eval_episodes / ENV_STEPS_PER_S
    if cfg.mode == "pretrain":
        evaluation_s = 0.2 * epoch_s  # held-out slices, without gradients
    evaluated = t.epochs / t.eval_every if t.eval_every else 1
    minutes = SAFETY * (t.epochs * epoch_s + evaluated * evaluation_s) / 60 + START_UP_MIN
    return max(LEAST_MIN, math.ceil(minutes / 15) * 15)


# The resources that a run requests ------------------------------------------------------------------------------------


MIB = 2**20
#: Smallest memory request, MiB.
LEAST_MB = 1024
DEFAULT_CPUS = 2


@dataclass(frozen=True)
class Resources:
    """Resources of a job; the rest of its profile is in the configuration.

    Attributes:
        mem_mb (int): host memory per node, MiB.
        cpus (int): CPUs per task.
        gpus (int): GPUs per node, with one task each.
        nodes (int): number of nodes.
        time_min (int): time limit of one job, minutes; a job of a longer run is requeued until the run is done.
    """

    mem_mb: int
    cpus: int
    gpus: int
    nodes: int
    time_min: int

    @property
    def tasks_per_node(self) -> int:
        """One task per GPU, or one without GPUs."""
        return max(1, self.gpus)

    def as_dict(self) -> dict[str, int]:
        """Plain values for ``job.json``."""
        return asdict(self)

    def maximum(self, other: Resources) -> Resources:
        """The maximum of both in every resource, for jobs of one array."""
        return Resources(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def resources_for(cfg: Config, plan: Plan) -> Resources:
    """The resources of a run: those that its profile sets, and estimates for the others.

    Raises:
        ConfigurationError: if the profile requests more than it allows itself.
    """
    profile = cfg.cluster
    mem_mb = _memory_mb(profile)
    if mem_mb is None:
        # The run stops itself at a fraction of the limit, so the request must be larger than its need.
        needed = plan.prediction.total("host") / plan.share("host")
        mem_mb = _at_most(max(LEAST_MB, math.ceil(needed / MIB / 256) * 256), _ceiling_mb(profile))
    cpus = _cpus(cfg) or DEFAULT_CPUS
    minutes = _minutes(profile)
    if minutes is None:
        minutes = _at_most(estimated_minutes(cfg, plan, cpus), profile.max_time_min)
    return Resources(mem_mb, cpus, _gpus(cfg), profile.nodes, minutes)


def resources_again(before: Resources, cfg: Config, keys: Collection[str]) -> Resources:
    """The resources of a run that is submitted again: as before, except for those that are set explicitly now.

    A key that is set to null leaves its resource as it was. The memory may be more than in the configuration, because a
    run that ran out of memory requests more.

    Args:
        before (Resources): resources of its last job.
        cfg (Config): its configuration with the new settings.
        keys (collection of str): the keys that are set explicitly.

    Raises:
        ConfigurationError: if the profile requests more than it allows itself.
    """
    profile = cfg.cluster

    def given(*names: str) -> bool:
        return any(name in keys for name in names)

    memory = _memory_mb(profile) if given("cluster.mem_gib") else None
    cpus = _cpus(cfg) if given("cluster.cpus", "training.threads") else None
    minutes = _minutes(profile) if given("cluster.time", "cluster.time_min") else None
    return replace(
        before,
        mem_mb=_at_most(memory or before.mem_mb, _ceiling_mb(profile) if given("cluster.host_gib") else None),
        cpus=cpus or before.cpus,
        gpus=_gpus(cfg) if given("cluster.gpus") else before.gpus,
        nodes=profile.nodes if given("cluster.nodes") else before.nodes,
        time_min=_at_most(minutes or before.time_min, profile.max_time_min if given("cluster.max_time_min") else None),
    )


def _at_most(number: int, limit: int | None) -> int:
    return number if limit is None else min(number, limit)


def _ceiling_mb(profile: ClusterConfig) -> int | None:
    """Maximum memory of a job with this profile, MiB; ``None`` if it has no limit."""
    return None if profile.host_gib is None else int(profile.host_gib * 1024)


def _memory_mb(profile: ClusterConfig) -> int | None:
    """The memory that a profile requests, MiB; ``None`` if the memory plan determines it."""
    if profile.mem_gib is None:
        return None
    mem_mb, ceiling = int(profile.mem_gib * 1024), _ceiling_mb(profile)
    if ceiling is not None and mem_mb > ceiling:
        raise ConfigurationError(
            f"cluster.mem_gib={profile.mem_gib:g} is more than a node of cluster={profile.name} has, "
            f"cluster.host_gib={profile.host_gib:g}; request at most that"
        )
    return mem_mb


def _cpus(cfg: Config) -> int | None:
    """The CPUs to request: those of the profile, else one per thread; ``None`` if neither is set."""
    threads, cpus = cfg.training.threads, cfg.cluster.cpus
    if threads is not None and cpus is not None and threads > cpus:
        raise ConfigurationError(
            f"training.threads={threads} is more than cluster.cpus={cpus}, the CPUs that each task gets; set "
            f"cluster.cpus={threads}, or leave training.threads out"
        )
    return cpus or threads


def _gpus(cfg: Config) -> int:
    return 0 if cfg.device == "cpu" else cfg.cluster.gpus


def _minutes(profile: ClusterConfig) -> int | None:
    """The time limit that a profile sets, minutes; ``None`` if it is to be estimated."""
    minutes = profile.time_min
    if minutes is not None and profile.max_time_min is not None and minutes > profile.max_time_min:
        raise ConfigurationError(
            f"cluster.time_min={minutes} is longer than cluster={profile.name} allows, "
            f"cluster.max_time_min={profile.max_time_min}; set at most that; a longer run is requeued automatically"
        )
    return minutes


#: Options of sbatch that a run sets itself, with the key under ``cluster`` that sets them; ``None`` if there is none.
_TAKEN = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "gres": "gres",
    "comment": "comment", "nodes": "nodes", "cpus-per-task": "cpus", "mem": "mem_gib", "time": "time", "signal":
    "signal_delay_s", "gpus": "gpus", "gpus-per-node": "gpus", "gpus-per-task": "gpus",
    **dict.fromkeys((
        "job-name", "output", "error", "input", "array", "open-mode", "requeue", "no-requeue", "dependency", "ntasks",
        "kill-on-invalid-dep", "ntasks-per-node", "wrap", "chdir", "parsable", "wait", "export",
    )),
}  # fmt: skip


def sbatch_options(profile: ClusterConfig) -> dict[str, Any]:
    """The options of ``cluster.sbatch`` in sbatch's spelling, without those that are null or false.

    Raises:
        ConfigurationError: for an option that another key sets, or a key or value that cannot be an option.
    """
    found: dict[str, Any] = {}
    for key, value in profile.sbatch.items():
        name = str(key).strip().lstrip("-").replace("_", "-")
        written = f"cluster.sbatch.{key}={value}"
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise ConfigurationError(
                f"{written}: {key!r} is not the long name of an sbatch option, such as reservation"
            )
        if name in _TAKEN:
            other = _TAKEN[name]
            instead = f"set cluster.{other}" if other else "a run sets it itself"
            raise ConfigurationError(f"{written} cannot be given here: {instead}")
        if isinstance(value, (dict, list)) or "\n" in str(value):
            raise ConfigurationError(f"{written} is not one line of text, a number, true or false")
        if value is not None and value is not False:
            found[name] = value
    return found


#: Variables ``SBATCH_*`` (without the prefix) that correspond to a key of a profile.
_VARIABLES = {
    "PARTITION": "partition", "ACCOUNT": "account", "QOS": "qos", "CONSTRAINT": "constraint", "GRES": "gres",
    "COMMENT": "comment", "TIMELIMIT": "time_min",
}  # fmt: skip
#: Variables ``SBATCH_*`` for options without such a key, and those of them that take no value.
_OPTIONS = (
    "RESERVATION", "EXCLUSIVE", "CLUSTERS", "WCKEY", "NETWORK", "HINT", "DISTRIBUTION", "CORE_SPEC", "THREAD_SPEC",
    "GRES_FLAGS", "GPU_BIND", "GPU_FREQ", "CONTAINER", "SPREAD_JOB", "OVERCOMMIT", "PROFILE", "DELAY_BOOT",
)  # fmt: skip
_FLAGS = ("EXCLUSIVE", "SPREAD_JOB", "OVERCOMMIT")


def take_variables(profile: ClusterConfig, environ: Mapping[str, str]) -> list[str]:
    """Fill the open settings of a profile from the variables ``SBATCH_*`` of the user's shell, outside of jobs.

    They are stored in the configuration so that they also apply to a job that is requeued, whose environment is that of
    a compute node.

    Args:
        profile (ClusterConfig): changed in place; its own settings take precedence.
        environ (Mapping): environment variables of the process.

    Returns:
        list of str: variables that are set but ignored, because the run plans their settings itself.

    Raises:
        ConfigurationError: for an invalid time limit.
    """
    ignored = []
    for name, value in sorted(environ.items()):
        variable = name.removeprefix("SBATCH_")
        if variable == name or not value:
            continue
        if variable in _VARIABLES:
            key = _VARIABLES[variable]
            if getattr(profile, key) is None:
                try:
                    setattr(profile, key, to_minutes(value) if key == "time_min" else value)
                except ValueError as error:
                    raise ConfigurationError(f"{name}={value}: {error}; unset it, or set cluster.time") from error
        elif variable in _OPTIONS:
            option = variable.lower().replace("_", "-")
            if option not in {str(key).replace("_", "-") for key in profile.sbatch}:
                flag = variable in _FLAGS and value.lower() in ("1", "yes", "true", "exclusive")
                profile.sbatch[option] = True if flag else value
        else:
            ignored.append(name)
    return ignored


def sbatch_parameters(cfg: Config, resources: Resources, name: str, after: str | None = None) -> dict[str, Any]:
    """Parameters of submitit's executor for a job, which starts after job ``after`` has succeeded."""
    profile = cfg.cluster
    extra: dict[str, Any] = {"requeue": True, **sbatch_options(profile)}
    if after is not None:
        # Without kill-on-invalid-dep, a job would wait forever for one that failed.
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": resources.time_min,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus,
        # Not submitit's mem_gb, which rounds to whole GB.
        "mem": f"{resources.mem_mb}M",
        "signal_delay_s": profile.signal_delay_s,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": list(profile.setup),
        "additional_parameters": extra,
        "wckey": None,
    }
    if {"mem-per-cpu", "mem-per-gpu"} & extra.keys():
        del parameters["mem"]  # sbatch accepts only one of them
    if profile.gres is not None:
        parameters["gres"] = profile.gres
    elif resources.gpus:
        parameters["gres"] = f"gpu:{resources.gpus}"
    if profile.array_parallelism is not None:
        parameters["array_parallelism"] = profile.array_parallelism
    for key in ("partition", "account", "qos", "constraint", "comment"):
        value = getattr(profile, key)
        if value is not None:
            parameters[key] = value
    return parameters


# Whether the nodes of a partition could run a job ---------------------------------------------------------------------


@dataclass(frozen=True)
class JobRequest:
    """The request of a job; ``None`` stands for a setting that is not given.

    Attributes:
        partition: names separated by commas; ``None``: the default partition.
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
        """The request of a profile, with a run's resources if they are known already."""
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
    """Why the requested partitions could never run the job: a sentence with the key to change.

    If there are several partitions, it is enough that one of them fits.

    Args:
        request (JobRequest): the request.
        site (Site): the cluster.

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
    """The limit of the partition that a request exceeds, as a sentence; ``None`` if there is none."""
    where = f"partition {partition.name}"
    if not partition.up:
        return f"{where} accepts no jobs now; set cluster.partition to another one"
    if _exceeds(request.minutes, partition.max_minutes):
        return (
            f"a time limit of {request.minutes} min is longer than {where} allows, {partition.max_minutes} min; set "
            f"cluster.max_time_min={partition.max_minutes}, and longer runs are requeued until they finish"
        )
    if _exceeds(request.nodes, partition.max_nodes):
        return f"cluster.nodes={request.nodes} is more than {where} allows, {partition.max_nodes}"
    cpus = request.tasks * (request.cpus or 1)
    if _exceeds(cpus, partition.max_cpus):
        return f"{_cpus_of(request)} are more than {where} allows on a node, {partition.max_cpus}; lower cluster.cpus"
    most = min((m for m in (partition.max_memory_mb, config.max_memory_mb) if m is not None), default=None)
    if _exceeds(request.memory_mb, most):
        return _too_much_memory(request, where, most or 0)
    return None


def _beyond_nodes(request: JobRequest, partition: Partition, nodes: Sequence[Node]) -> str | None:
    """What the partition's nodes do not have, each resource separately and then all together; ``None`` if they fit."""
    where = f"partition {partition.name}"
    if not nodes:
        return f"{where} has no nodes; set cluster.partition to another one"
    cpus = request.tasks * (request.cpus or 1)
    most_cpus = max(node.cpus for node in nodes)
    if cpus > most_cpus:
        return f"{_cpus_of(request)} are more than a node of {where} has, {most_cpus}; lower cluster.cpus"
    most_memory = max(node.memory_mb for node in nodes)
    if _exceeds(request.memory_mb, most_memory):
        return _too_much_memory(request, where, most_memory)
    for kind, count in request.gpus:
        most = max(_gpus_of(node, kind) for node in nodes)
        if count > most:
            asked = "1 GPU" if count == 1 else f"{count} GPUs"
            return (
                f"{asked}{f' of type {kind}' if kind else ''} per node requested, but a node of {where} has "
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
        lambda node: all(_gpus_of(node, kind) >= count for kind, count in request.gpus),
        lambda node: set(features) <= set(node.features),
    ]
    able = [node for node in nodes if all(has(node) for has in wanted)]
    if len(able) < request.nodes:
        return (
            f"cluster.nodes={request.nodes}: only {len(able)} of the {len(nodes)} nodes of {where} meet all requests "
            "at once; lower cluster.nodes, cluster.cpus, cluster.mem_gib or cluster.gpus"
        )
    return None


def _too_much_memory(request: JobRequest, where: str, most: int) -> str:
    gib = math.floor(most / 1024 * 100) / 100
    return (
        f"{request.memory_mb} MiB of host memory are more than a job may have on a node of {where}, {most} MiB; set "
        f"cluster.mem_gib={gib:g} or less, or cluster.host_gib={gib:g} for a plan that fits"
    )


def _cpus_of(request: JobRequest) -> str:
    each = request.cpus or 1
    return f"{each} CPUs" if request.tasks == 1 else f"{request.tasks} tasks with {each} CPUs each"


def _gpus_of(node: Node, kind: str) -> int:
    return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())


def _exceeds(asked: int | None, most: int | None) -> bool:
    return asked is not None and most is not None and asked > most


def node_memory_mb(partition: str | None, site: Site) -> int:
    """Smallest memory of a node in the given partitions, MiB; ``None`` stands for SLURM's default partition.

    Raises:
        ConfigurationError: if a partition does not exist or there are no nodes.
    """
    known = [each.name for each in site.partitions]
    for name in partition.split(",") if partition else []:
        if name not in known:
            raise ConfigurationError(f"cluster.partition={name} does not exist; choose one of {', '.join(known)}")
    names = partition.split(",") if partition else [each.name for each in site.partitions if each.default]
    found = [node.memory_mb for node in site.nodes if set(names) & set(node.partitions)]
    if not found:
        asked = f"cluster.partition={partition}" if partition else "a default partition"
        raise ConfigurationError(f"SLURM has no nodes in {asked}; set cluster.partition, or cluster.host_gib")
    return min(found)


def require_fit(cluster: ClusterConfig, resources: Resources, site: Site) -> None:
    """Reject a request that SLURM might accept but could never run.

    Raises:
        ConfigurationError: if no node can ever run it; the message names the key to change.
    """
    reason = why_impossible(JobRequest.of(cluster, resources), site)
    if reason is not None:
        raise ConfigurationError(reason)
