"""The resources that a run asks SLURM for: from its memory plan, its length and the cluster's profile."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pwm_torchrl.cluster.length import estimated_minutes
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.memory.plan import Plan

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
    ceiling = None if profile.host_gb is None else int(profile.host_gb * 1e9 / MIB)
    if profile.mem_gb is not None:
        mem_mb = int(profile.mem_gb * 1024)
        if ceiling is not None and mem_mb > ceiling:
            raise ConfigurationError(
                f"cluster.mem_gb={profile.mem_gb:g} GiB is more than a node of cluster={profile.name} has, "
                f"cluster.host_gb={profile.host_gb:g} GB; ask for at most {ceiling / 1024:.1f}"
            )
    else:
        # The run stops itself at a share of the limit and leaves a margin below that: both have to be asked for.
        needed = plan.prediction.total("host") / plan.share("host")
        mem_mb = max(LEAST_MB, math.ceil(needed / MIB / 256) * 256)
        if ceiling is not None:
            mem_mb = min(mem_mb, ceiling)
    gpus = 0 if cfg.device == "cpu" else profile.gpus
    cpus = profile.cpus or DEFAULT_CPUS
    minutes = profile.time_min
    if minutes is None:
        minutes = estimated_minutes(cfg, plan, cpus)
        if profile.max_time_min is not None:
            minutes = min(minutes, profile.max_time_min)
    elif profile.max_time_min is not None and minutes > profile.max_time_min:
        raise ConfigurationError(
            f"cluster.time_min={minutes} is longer than cluster={profile.name} allows, "
            f"cluster.max_time_min={profile.max_time_min}; a longer run comes back by itself"
        )
    return Resources(mem_mb, cpus, gpus, profile.nodes, minutes)


def sbatch_parameters(cfg: Config, resources: Resources, name: str, after: str | None = None) -> dict[str, Any]:
    """Parameters of submitit's executor for a job; it begins when job ``after`` has succeeded."""
    profile = cfg.cluster
    extra: dict[str, Any] = {"requeue": True}
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
