"""Reading what SLURM's commands write; every function here works on text alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pwm_torchrl.cluster.times import UNLIMITED, to_minutes

__all__ = [
    "SACCT_FIELDS",
    "SQUEUE_FORMAT",
    "JobState",
    "Node",
    "Partition",
    "Site",
    "SlurmConfig",
    "parse_config",
    "parse_nodes",
    "parse_partitions",
    "parse_sacct",
    "parse_squeue",
    "records",
]

SQUEUE_FORMAT = "%i|%T|%M|%N|%r"  # the reason last: it is free text
SACCT_FIELDS = "JobID,State,Elapsed,NodeList,Reason"

#: States in which a job waits, perhaps again.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
#: States in which a job has nodes.
ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
#: Reasons of a waiting job that nobody but a user, or the administrator, lets go on.
_HELD = re.compile(r"held|hold", re.IGNORECASE)
#: Reasons of a waiting job that will never start as it is.
NEVER = ("PartitionConfig", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "DependencyNeverSatisfied")


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        job_id: ``12``, or ``12_3`` for a task of an array.
        state: ``PENDING``, ``RUNNING``, ``COMPLETED``, ``TIMEOUT``, ... A job that is requeued passes through
            ``COMPLETING``.
        reason: why it waits or ended so, SLURM's word; empty if there is none.
        elapsed: how long it has run, SLURM's writing.
        nodes: where it runs or ran last, SLURM's writing; may be empty.
    """

    job_id: str
    state: str
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""

    @property
    def waiting(self) -> bool:
        """Whether it has yet to start, or to start again."""
        return self.state in WAITING

    @property
    def ended(self) -> bool:
        """Whether it will not run any more by itself."""
        return self.state not in (*WAITING, *ACTIVE)

    @property
    def held(self) -> bool:
        """Whether it waits until somebody releases it (``scontrol release``)."""
        return self.waiting and _HELD.search(self.reason) is not None

    @property
    def impossible(self) -> bool:
        """Whether it waits for what its partition cannot give."""
        return self.waiting and self.reason in NEVER


@dataclass(frozen=True)
class Partition:
    """A partition; ``None`` stands for no limit.

    Attributes:
        name: its name.
        default: whether jobs that name none come here.
        up: whether it takes jobs.
        max_minutes: longest time limit of a job.
        max_nodes: most nodes of a job.
        max_cpus: most CPUs of a job on a node.
        max_memory_mb: most memory of a job on a node, MiB.
    """

    name: str
    default: bool = False
    up: bool = True
    max_minutes: int | None = None
    max_nodes: int | None = None
    max_cpus: int | None = None
    max_memory_mb: int | None = None


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name: its name.
        state: SLURM's words in capitals, joined by ``+``.
        cpus: CPUs that jobs may have.
        memory_mb: memory that jobs may have, MiB.
        gpus: number of GPUs by type; the type is ``""`` where SLURM names none.
        features: what ``--constraint`` can ask for.
        partitions: names of those it is in.
    """

    name: str
    state: str = "IDLE"
    cpus: int = 1
    memory_mb: int = 0
    gpus: dict[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()

    @property
    def up(self) -> bool:
        """Whether it takes jobs, now or when others have ended."""
        words = re.split(r"[+*~#!%$@^-]", self.state)
        return not {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "NOT_RESPONDING", "UNKNOWN"} & set(words)


@dataclass(frozen=True)
class SlurmConfig:
    """What the controller is set to.

    Attributes:
        version: of SLURM.
        cluster: the cluster's name.
        max_array_size: indices of an array are below it.
        accounting: whether ended jobs are remembered in a database, for ``sacct``.
        requeue: whether jobs come back after preemption and the loss of a node unless they object.
        requeue_hold_s: seconds that a requeued job waits before it may start.
        kill_wait_s: seconds between SIGTERM and SIGKILL.
        remembers_s: seconds for which an ended job is remembered without accounting.
        enforces_limits: whether what exceeds a partition's limits is refused; otherwise it waits for ever.
        max_memory_mb: most memory of a job on a node, MiB; ``None``: no limit.
    """

    version: str
    cluster: str = ""
    max_array_size: int = 1001
    accounting: bool = False
    requeue: bool = True
    requeue_hold_s: int = 120
    kill_wait_s: int = 30
    remembers_s: int = 300
    enforces_limits: bool = False
    max_memory_mb: int | None = None


@dataclass(frozen=True)
class Site:
    """A whole cluster.

    Attributes:
        config: the controller's settings.
        partitions: all that this user may see.
        nodes: all of them, up or down.
    """

    config: SlurmConfig
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]


def parse_squeue(text: str) -> dict[str, JobState]:
    """Jobs by id, of ``squeue -h -r -o`` with :data:`SQUEUE_FORMAT`."""
    found = {}
    for line in text.splitlines():
        if line.count("|") >= 4:
            job_id, state, elapsed, nodes, reason = line.strip().split("|", 4)
            found[job_id] = JobState(job_id, state, _said(reason), elapsed, _said(nodes))
    return found


def parse_sacct(text: str) -> dict[str, JobState]:
    """Jobs by id, of ``sacct -X -n --parsable2 -o`` with :data:`SACCT_FIELDS`, without tasks that wait."""
    found = {}
    for line in text.splitlines():
        if line.count("|") >= 4 and not line.startswith("JobID|"):
            job_id, state, elapsed, nodes, reason = line.strip().split("|", 4)
            if "[" not in job_id and "." not in job_id:
                # "CANCELLED by 1000"
                found[job_id] = JobState(
                    job_id, state.split()[0] if state else "", _said(reason), elapsed, _said(nodes)
                )
    return found


def records(text: str) -> list[dict[str, str]]:
    """Lines of ``scontrol --oneliner show`` as ``{key: value}``; values may hold blanks."""
    pattern = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)")
    found = []
    for line in text.splitlines():
        pairs = pattern.findall(line)
        if pairs:
            found.append({key: value.strip() for key, value in reversed(pairs)})  # the first of equal keys
    return found


def parse_partitions(text: str) -> list[Partition]:
    """Of ``scontrol --oneliner show partition``."""
    return [
        Partition(
            name=each["PartitionName"],
            default=each.get("Default") == "YES",
            up=each.get("State", "UP") == "UP",
            max_minutes=to_minutes(each.get("MaxTime", "UNLIMITED")),
            max_nodes=_limit(each.get("MaxNodes")),
            max_cpus=_limit(each.get("MaxCPUsPerNode")),
            max_memory_mb=_limit(each.get("MaxMemPerNode")),
        )
        for each in records(text)
        if "PartitionName" in each
    ]


def parse_nodes(text: str) -> list[Node]:
    """Of ``scontrol --oneliner show node``."""
    return [
        Node(
            name=each["NodeName"],
            state=each.get("State", "UNKNOWN"),
            cpus=int(each.get("CPUEfctv") or each.get("CPUTot") or 1),
            memory_mb=int(each.get("RealMemory", "0")),
            gpus=parse_gpus(each.get("Gres", "")),
            features=_names(each.get("AvailableFeatures", "")),
            partitions=_names(each.get("Partitions", "")),
        )
        for each in records(text)
        if "NodeName" in each
    ]


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type in a list of generic resources: ``gpu:l40s:4(S:0-1),lustre:1`` is ``{"l40s": 4}``."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
            kind = ":".join(rest)
            found[kind] = found.get(kind, 0) + count
    return found


def parse_config(text: str) -> SlurmConfig:
    """Of ``scontrol show config``."""
    values = {}
    for line in text.splitlines():
        key, equal, value = line.partition("=")
        if equal:
            values[key.strip()] = value.strip()
    hold = re.search(r"cred_expire=(\d+)", values.get("AuthInfo", ""))
    return SlurmConfig(
        version=values.get("SLURM_VERSION", "unknown"),
        cluster=values.get("ClusterName", ""),
        max_array_size=int(values.get("MaxArraySize", "1001")),
        accounting=values.get("AccountingStorageType", "").endswith("slurmdbd"),
        requeue=values.get("JobRequeue", "1") == "1",
        requeue_hold_s=int(hold[1]) if hold else 120,
        kill_wait_s=_seconds(values.get("KillWait"), 30),
        remembers_s=_seconds(values.get("MinJobAge"), 300),
        enforces_limits=values.get("EnforcePartLimits", "NO") != "NO",
        max_memory_mb=_limit(values.get("MaxMemPerNode")),
    )


def _said(value: str) -> str:
    return "" if value in ("None", "(null)", "None assigned", "Unknown") else value


def _names(value: str) -> tuple[str, ...]:
    return tuple(name for name in value.split(",") if name and name != "(null)")


def _limit(value: str | None) -> int | None:
    """A number, ``None`` for no limit; 0 is none either."""
    return None if value is None or value.upper() in UNLIMITED else int(value) or None


def _seconds(value: str | None, default: int) -> int:
    """``3 sec``."""
    return int(value.split()[0]) if value and value.split()[0].isdigit() else default
