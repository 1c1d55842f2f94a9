"""The resources that a run asks SLURM for: memory, CPUs, GPUs, a time limit, on nodes that have them.

A job that reaches its limit saves and comes back, so that a guess that is too short costs a restart and one that is too
long costs queue priority; nothing else depends on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pwm_torchrl.cluster.feasibility import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Site, to_minutes
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.memory.plan import Plan

# How long a run may take ----------------------------------------------------------------------------------------------


#: Floating-point operations per second that small matrix products reach: a guess, per CPU core and per GPU.
CPU_FLOPS, GPU_FLOPS = 5e9, 8e12
#: Seconds that an update takes beside its arithmetic: launching kernels, per network evaluation of the rollout.
OVERHEAD_S = 4e-4
#: Agent steps per second of an environment on a core, with TorchRL's overhead: a slow simulator's.
STEPS_PER_S = 500.0
#: A guess is multiplied by this, and start-up is added.
SAFETY, START_UP_MIN, LEAST_MIN = 3.0, 15, 30


def estimated_minutes(cfg: Config, plan: Plan, cpus: int) -> int:
    """A time limit for the whole run, in minutes."""
    a, t = cfg.algorithm, cfg.training
    parameters = sum(item.bytes for item in plan.prediction.items if item.what == "parameters") / 4
    evaluations = plan.prediction.evaluations
    if plan.choices.checkpoint_substeps:
        evaluations += evaluations
    made = plan.prediction.updates
    unrolled = [update for update in made if update.name != "critic"]
    # Forward and backward: six operations per parameter and row.
    rows = sum(update.per_epoch * update.batch * update.steps for update in unrolled)
    flops = 6 * parameters * rows * evaluations
    on_gpu = plan.prediction.compute == "device"
    arithmetic = flops / (GPU_FLOPS if on_gpu else CPU_FLOPS * cpus)
    calls = sum(update.per_epoch * update.steps for update in unrolled) * (evaluations + 2) * 3
    critics = sum(update.per_epoch for update in made if update.name == "critic") * 6
    envs = int(cfg.env.get("num_envs", 1)) if cfg.mode == "online" else 0
    collection = envs * a.steps_per_env / STEPS_PER_S
    epoch_s = arithmetic + (calls + critics) * OVERHEAD_S + collection
    evaluation_s = int(cfg.env.get("episode_length") or 1000) * t.eval_episodes / STEPS_PER_S
    if cfg.mode == "pretrain":
        evaluation_s = 0.2 * epoch_s  # held-out slices, without gradients
    evaluated = t.epochs / t.eval_every if t.eval_every else 1
    minutes = SAFETY * (t.epochs * epoch_s + evaluated * evaluation_s) / 60 + START_UP_MIN
    return max(LEAST_MIN, math.ceil(minutes / 15) * 15)


# The resources that a run asks SLURM for ------------------------------------------------------------------------------


MIB = 2**20
#: Smaller requests are not worth their risk.
LEAST_MB = 1024
DEFAULT_CPUS = 2


@dataclass(frozen=True)
class Resources:
    """Resources of a job; the rest of its profile is in the configuration.

    Attributes:
        mem_mb (int): host memory per node, MiB.
        cpus (int): per task.
        gpus (int): per node; a task each.
        nodes (int): of the job.
        time_min (int): limit of one job, minutes; a longer run comes back until it is done.
    """

    mem_mb: int
    cpus: int
    gpus: int
    nodes: int
    time_min: int

    @property
    def tasks_per_node(self) -> int:
        """A process for each GPU, one without."""
        return max(1, self.gpus)

    def as_dict(self) -> dict[str, int]:
        """Plain values for ``job.json``."""
        return asdict(self)

    def covering(self, other: Resources) -> Resources:
        """The least that is enough for both, for jobs of one array."""
        return Resources(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def resources_for(cfg: Config, plan: Plan) -> Resources:
    """What the run needs, as far as its profile does not say it.

    Raises:
        ConfigurationError: if the profile cannot give what its own keys ask for.
    """
    profile = cfg.cluster
    mem_mb = _memory_mb(profile)
    if mem_mb is None:
        # The run stops itself at a share of the limit and leaves a margin below that: both have to be asked for.
        needed = plan.prediction.total("host") / plan.share("host")
        mem_mb = _at_most(max(LEAST_MB, math.ceil(needed / MIB / 256) * 256), _ceiling_mb(profile))
    cpus = _cpus(cfg) or DEFAULT_CPUS
    minutes = _minutes(profile)
    if minutes is None:
        minutes = _at_most(estimated_minutes(cfg, plan, cpus), profile.max_time_min)
    return Resources(mem_mb, cpus, _gpus(cfg), profile.nodes, minutes)


def resources_again(before: Resources, cfg: Config, keys: Collection[str]) -> Resources:
    """What a run asks for when it comes back: the same as before, except for what is set explicitly now.

    A key that is set to null leaves its resource as it was. The memory may be more than the configuration says, since
    a run that ran out of memory asks for more by itself.

    Args:
        before (Resources): of its last job.
        cfg (Config): its configuration with the new settings.
        keys (collection of str): the keys that are set explicitly.

    Raises:
        ConfigurationError: if the profile cannot give what its own keys ask for.
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
    """The most memory that a job of the profile may have, MiB."""
    return None if profile.host_gib is None else int(profile.host_gib * 1024)


def _memory_mb(profile: ClusterConfig) -> int | None:
    """The memory that a profile asks for, MiB; ``None`` where that is planned."""
    if profile.mem_gib is None:
        return None
    mem_mb, ceiling = int(profile.mem_gib * 1024), _ceiling_mb(profile)
    if ceiling is not None and mem_mb > ceiling:
        raise ConfigurationError(
            f"cluster.mem_gib={profile.mem_gib:g} is more than a node of cluster={profile.name} has, "
            f"cluster.host_gib={profile.host_gib:g}; ask for at most that"
        )
    return mem_mb


def _cpus(cfg: Config) -> int | None:
    """The CPUs that are asked for, one for each thread unless the profile says otherwise."""
    threads, cpus = cfg.training.threads, cfg.cluster.cpus
    if threads is not None and cpus is not None and threads > cpus:
        raise ConfigurationError(
            f"training.threads={threads} are more than cluster.cpus={cpus}, the CPUs that each task gets; set "
            f"cluster.cpus={threads}, or leave training.threads out"
        )
    return cpus or threads


def _gpus(cfg: Config) -> int:
    return 0 if cfg.device == "cpu" else cfg.cluster.gpus


def _minutes(profile: ClusterConfig) -> int | None:
    """The time limit that a profile sets; ``None`` where that is estimated."""
    minutes = profile.time_min
    if minutes is not None and profile.max_time_min is not None and minutes > profile.max_time_min:
        raise ConfigurationError(
            f"cluster.time_min={minutes} is longer than cluster={profile.name} allows, "
            f"cluster.max_time_min={profile.max_time_min}; a longer run comes back by itself"
        )
    return minutes


#: Options of sbatch that a run sets itself, and the keys that set them; none where nothing may.
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
    """The options of ``cluster.sbatch`` as sbatch spells them, without those that are null or false.

    Raises:
        ConfigurationError: for what is set by another key, or is no option at all.
    """
    found: dict[str, Any] = {}
    for key, value in profile.sbatch.items():
        name = str(key).strip().lstrip("-").replace("_", "-")
        written = f"cluster.sbatch.{key}={value}"
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise ConfigurationError(
                f"{written}: {key!r} is not the long name of an option of sbatch, like reservation"
            )
        if name in _TAKEN:
            other = _TAKEN[name]
            instead = f"set cluster.{other}" if other else "a run sets that itself"
            raise ConfigurationError(f"{written} cannot be given here: {instead}")
        if isinstance(value, (dict, list)) or "\n" in str(value):
            raise ConfigurationError(f"{written} is not one line of text, a number, true or false")
        if value is not None and value is not False:
            found[name] = value
    return found


#: Variables of the user's shell by which sbatch takes options, without their ``SBATCH_``: keys of a profile.
_VARIABLES = {
    "PARTITION": "partition", "ACCOUNT": "account", "QOS": "qos", "CONSTRAINT": "constraint", "GRES": "gres",
    "COMMENT": "comment", "TIMELIMIT": "time_min",
}  # fmt: skip
#: Likewise: options that no key stands for, and those of them that take no value.
_OPTIONS = (
    "RESERVATION", "EXCLUSIVE", "CLUSTERS", "WCKEY", "NETWORK", "HINT", "DISTRIBUTION", "CORE_SPEC", "THREAD_SPEC",
    "GRES_FLAGS", "GPU_BIND", "GPU_FREQ", "CONTAINER", "SPREAD_JOB", "OVERCOMMIT", "PROFILE", "DELAY_BOOT",
)  # fmt: skip
_FLAGS = ("EXCLUSIVE", "SPREAD_JOB", "OVERCOMMIT")


def take_variables(profile: ClusterConfig, environ: Mapping[str, str]) -> list[str]:
    """Fill in what a profile leaves open from the variables ``SBATCH_*`` of the user's shell, outside of jobs.

    Written into the configuration they also hold for a job that comes back, whose environment is that of a node.

    Args:
        profile (ClusterConfig): changed in place; what it says wins.
        environ (Mapping): of the process.

    Returns:
        list of str: variables that are set and not taken: what they are about is planned.

    Raises:
        ConfigurationError: for a time limit that is none.
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
                flag = variable in ("EXCLUSIVE", "SPREAD_JOB", "OVERCOMMIT") and value.lower() in (
                    "1",
                    "yes",
                    "true",
                    "exclusive",
                )
                profile.sbatch[option] = True if flag else value
        else:
            ignored.append(name)
    return ignored


def sbatch_parameters(cfg: Config, resources: Resources, name: str, after: str | None = None) -> dict[str, Any]:
    """Parameters of submitit's executor for a job; it begins when job ``after`` has succeeded."""
    profile = cfg.cluster
    extra: dict[str, Any] = {"requeue": True, **sbatch_options(profile)}
    if after is not None:
        # Without the second, jobs would wait for ever for one that failed.
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
        del parameters["mem"]  # sbatch takes one of them
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


# What the nodes of a partition have, and whether they could run a job -------------------------------------------------


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
        raise ConfigurationError(f"SLURM has no nodes in {asked}; set cluster.partition, or cluster.host_gib")
    return min(found)


def require_fit(cluster: ClusterConfig, resources: Resources, site: Site) -> None:
    """Refuse what SLURM would accept and never run.

    Raises:
        ConfigurationError: with the key to change.
    """
    reason = why_impossible(JobRequest.of(cluster, resources), site)
    if reason is not None:
        raise ConfigurationError(reason)
