"""Queries to SLURM: runs its commands and parses their output."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pwm_torchrl.cluster.restarts import read_job
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "SACCT_FIELDS",
    "SQUEUE_FORMAT",
    "UNLIMITED",
    "JobState",
    "Node",
    "Partition",
    "Site",
    "SlurmConfig",
    "SlurmError",
    "ask",
    "from_minutes",
    "job_records",
    "job_states",
    "live_job",
    "parse_config",
    "parse_nodes",
    "parse_partitions",
    "parse_sacct",
    "parse_squeue",
    "records",
    "scontrol",
    "site",
    "slurm_available",
    "to_minutes",
]

# Times as SLURM writes them, in minutes -------------------------------------------------------------------------------


#: Words for no limit.
UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "N/A")

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def to_minutes(text: str) -> int | None:
    """Minutes of a time limit, rounded up.

    Args:
        text (str): ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``,
            ``days-hours:minutes`` or ``days-hours:minutes:seconds``.

    Returns:
        int, optional: ``None`` for no limit.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip()
    if text.upper() in UNLIMITED:
        return None
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a SLURM time limit, such as 90, 24:00:00 or 1-12")
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    days = int(match["days"] or 0)
    return days * 24 * 60 + hours * 60 + minutes + math.ceil(seconds / 60)


def from_minutes(minutes: int) -> str:
    """``hours:minutes:00``, with days where there are any."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


# Parsing the output of SLURM's commands; these functions only work on text --------------------------------------------


SQUEUE_FORMAT = "%i|%T|%M|%N|%r"  # the reason last: it is free text
SACCT_FIELDS = "JobID,State,Elapsed,NodeList,Reason"

#: States in which a job waits, for the first time or after a requeue.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
#: States in which a job has nodes.
ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
#: Reasons of a waiting job that starts only after a user or an administrator releases it.
_HELD = re.compile(r"held|hold", re.IGNORECASE)
#: Reasons of a waiting job that can never start without a change.
IMPOSSIBLE_REASONS = (
    "PartitionConfig",
    "PartitionTimeLimit",
    "PartitionNodeLimit",
    "BadConstraints",
    "DependencyNeverSatisfied",
)


@dataclass(frozen=True)
class JobState:
    """State of a job as SLURM reports it.

    Attributes:
        job_id: ``12``, or ``12_3`` for a task of an array.
        state: ``PENDING``, ``RUNNING``, ``COMPLETED``, ``TIMEOUT``, ... A job that is requeued passes through
            ``COMPLETING``.
        reason: why it waits or ended, in SLURM's words; empty if there is none.
        elapsed: how long it has run, in SLURM's format.
        nodes: nodes on which it runs or ran last, in SLURM's format; may be empty.
    """

    job_id: str
    state: str
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""

    @property
    def waiting(self) -> bool:
        """Whether it waits to start, for the first time or again."""
        return self.state in WAITING

    @property
    def ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state not in (*WAITING, *ACTIVE)

    @property
    def held(self) -> bool:
        """Whether it waits until it is released (``scontrol release``)."""
        return self.waiting and _HELD.search(self.reason) is not None

    @property
    def impossible(self) -> bool:
        """Whether it waits for resources that its partition can never provide."""
        return self.waiting and self.reason in IMPOSSIBLE_REASONS


@dataclass(frozen=True)
class Partition:
    """A partition; ``None`` stands for no limit.

    Attributes:
        name: its name.
        default: whether it is the default for jobs that do not name a partition.
        up: whether it accepts jobs.
        max_minutes: maximum time limit of a job.
        max_nodes: maximum number of nodes of a job.
        max_cpus: maximum CPUs of a job on a node.
        max_memory_mb: maximum memory of a job on a node, MiB.
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
        state: SLURM's states in capitals, joined by ``+``.
        cpus: CPUs that are available to jobs.
        memory_mb: memory that is available to jobs, MiB.
        gpus: number of GPUs by type; the type is ``""`` if SLURM does not name it.
        features: features that ``--constraint`` can require.
        partitions: names of its partitions.
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
        """Whether it accepts jobs, now or after others have ended."""
        words = re.split(r"[+*~#!%$@^-]", self.state)
        return not {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "NOT_RESPONDING", "UNKNOWN"} & set(words)


@dataclass(frozen=True)
class SlurmConfig:
    """Settings of the SLURM controller.

    Attributes:
        version: version of SLURM.
        cluster: the cluster's name.
        max_array_size: upper bound of array indices, exclusive.
        accounting: whether ended jobs are stored in a database, for ``sacct``.
        requeue: whether jobs are requeued by default after preemption and node failures.
        requeue_hold_s: seconds that a requeued job waits before it may start.
        kill_wait_s: seconds between SIGTERM and SIGKILL.
        remembers_s: seconds for which an ended job is known without accounting.
        enforces_limits: whether requests beyond a partition's limits are rejected; otherwise they wait forever.
        max_memory_mb: maximum memory of a job on a node, MiB; ``None``: no limit.
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
        partitions: all partitions that this user may see.
        nodes: all nodes, up or down.
    """

    config: SlurmConfig
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]


def parse_squeue(text: str) -> dict[str, JobState]:
    """Parse the output of ``squeue -h -r -o`` with :data:`SQUEUE_FORMAT`; returns jobs by id."""
    found = {}
    for line in text.splitlines():
        if line.count("|") >= 4:
            job_id, state, elapsed, nodes, reason = line.strip().split("|", 4)
            found[job_id] = JobState(job_id, state, _said(reason), elapsed, _said(nodes))
    return found


def parse_sacct(text: str) -> dict[str, JobState]:
    """Parse the output of ``sacct -X -n --parsable2 -o`` with :data:`SACCT_FIELDS`; returns jobs by id.

    Waiting tasks of arrays are left out.
    """
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
    """Parse lines of ``scontrol --oneliner show`` to ``{key: value}``; values may contain blanks."""
    pattern = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)")
    found = []
    for line in text.splitlines():
        pairs = pattern.findall(line)
        if pairs:
            found.append({key: value.strip() for key, value in reversed(pairs)})  # of equal keys, keep the first
    return found


def parse_partitions(text: str) -> list[Partition]:
    """Parse the output of ``scontrol --oneliner show partition``."""
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
    """Parse the output of ``scontrol --oneliner show node``."""
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
    """Number of GPUs by type in a list of generic resources: ``gpu:l40s:4(S:0-1),lustre:1`` is ``{"l40s": 4}``."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
            kind = ":".join(rest)
            found[kind] = found.get(kind, 0) + count
    return found


def parse_config(text: str) -> SlurmConfig:
    """Parse the output of ``scontrol show config``."""
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
    """A number, or ``None`` for no limit, which 0 means too."""
    return None if value is None or value.upper() in UNLIMITED else int(value) or None


def _seconds(value: str | None, default: int) -> int:
    """The number of seconds in a text such as ``3 sec``, or the default."""
    return int(value.split()[0]) if value and value.split()[0].isdigit() else default


# Running SLURM's commands ---------------------------------------------------------------------------------------------


TIMEOUT_S = 20.0
COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_UNKNOWN_JOB = ("Invalid job id", "not found")
_NO_CLUSTER = "configuration source"
_NO_ACCOUNTING = "accounting storage is disabled"


class SlurmError(ConfigurationError):
    """SLURM does not answer, or rejects a command."""


def slurm_available() -> bool:
    """Whether this machine belongs to a SLURM cluster, whether its controller is up or down.

    Installed commands alone do not show this: packages of a distribution install them on machines without a cluster.
    """
    if any(shutil.which(command) is None for command in COMMANDS):
        return False
    try:
        answer = _run(["scontrol", "ping"])
    except SlurmError:
        return True  # there is a controller, but it did not answer in time
    return _NO_CLUSTER not in answer.stderr


def ask(command: Sequence[str]) -> str:
    """Runs one of SLURM's commands.

    Args:
        command (sequence of str): the command and its arguments.

    Returns:
        str: its output.

    Raises:
        SlurmError: if the command is not installed, does not answer within 20 seconds or fails.
    """
    answer = _run(command)
    if answer.returncode:
        raise _failure(command, answer.stderr or answer.stdout)
    return answer.stdout


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States of jobs and array tasks, from one call of ``squeue`` and one of ``sacct`` for those that it has forgotten.

    Args:
        job_ids (iterable of str): ``12`` or ``12_3``; for an array ``12``, the states of its tasks are returned.

    Returns:
        dict: states by id. Jobs that SLURM does not know are left out: without accounting, it forgets an ended job
        after some minutes (:attr:`~pwm_torchrl.cluster.slurm.SlurmConfig.remembers_s`).

    Raises:
        SlurmError: if SLURM does not answer.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    # squeue fails for a single unknown id, but not for one among several, so it is never called with a single id.
    asked = ",".join(ids if len(ids) > 1 else ids * 2)
    command = ["squeue", "-h", "-r", "-t", "all", "-j", asked, "-o", SQUEUE_FORMAT]
    answer = _run(command)
    if answer.returncode and not any(words in answer.stderr for words in _UNKNOWN_JOB):
        raise _failure(command, answer.stderr)
    found = parse_squeue(answer.stdout)
    known = {*found, *(job_id.partition("_")[0] for job_id in found)}
    forgotten = [job_id for job_id in ids if job_id not in known]
    return {**_remembered(forgotten), **found} if forgotten else found


def live_job(run_dir: Path) -> JobState | None:
    """The newest job of a run that waits, runs or will be requeued; ``None`` if there is none.

    Raises:
        SlurmError: if SLURM does not answer.
    """
    ids = [str(job_id) for job_id in read_job(run_dir).get("job_ids", [])]
    states = job_states(ids)
    alive = [states[job_id] for job_id in ids if job_id in states and not states[job_id].ended]
    return alive[-1] if alive else None


def job_records(job_id: str) -> list[dict[str, str]]:
    """The controller's record of a job, or of every task of an array.

    Returns:
        list of dict: ``JobState``, ``Reason``, ``Restarts``, ``DerivedExitCode``, ``PreemptTime``, ...; empty if it
        does not know the job (any more).

    Raises:
        SlurmError: if SLURM does not answer.
    """
    # Without --details there is no DerivedExitCode.
    command = ["scontrol", "--oneliner", "--details", "show", "job", job_id]
    answer = _run(command)
    if answer.returncode:
        if any(words in answer.stderr + answer.stdout for words in _UNKNOWN_JOB):
            return []
        raise _failure(command, answer.stderr)
    return records(answer.stdout)


def scontrol(*words: str) -> str | None:
    """Run ``scontrol`` to change a job; returns SLURM's error message, or ``None`` on success."""
    try:
        answer = _run(["scontrol", *words])
    except SlurmError as error:
        return str(error)
    return None if answer.returncode == 0 else " ".join(answer.stderr.split())


def site() -> Site:
    """Settings, partitions and nodes of the cluster, from one command for each.

    Raises:
        SlurmError: if SLURM does not answer.
    """
    return Site(
        parse_config(ask(["scontrol", "show", "config"])),
        tuple(parse_partitions(ask(["scontrol", "--oneliner", "show", "partition"]))),
        tuple(parse_nodes(ask(["scontrol", "--oneliner", "show", "node"]))),
    )


def _remembered(job_ids: list[str]) -> dict[str, JobState]:
    """States of ended jobs from accounting; empty if there is none."""
    if shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-X", "-n", "--parsable2", "-o", SACCT_FIELDS, "-j", ",".join(job_ids)]
    answer = _run(command)
    if answer.returncode:
        if _NO_ACCOUNTING in answer.stderr:
            return {}
        raise _failure(command, answer.stderr)
    return parse_sacct(answer.stdout)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(command), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"SLURM's command {command[0]} was not found; run this where jobs are submitted, or choose cluster=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"SLURM did not answer {command[0]} within {TIMEOUT_S:g} s; try again, or choose cluster=local"
        ) from error


def _failure(command: Sequence[str], said: str) -> SlurmError:
    lines = [line.split("error: ", 1)[-1].strip() for line in said.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(lines)) or "no message"
    if "Unable to contact" in reason:
        return SlurmError(f"SLURM's controller does not answer {command[0]} ({reason}); try again when it is back")
    if _NO_CLUSTER in reason:
        return SlurmError(
            "SLURM's commands are installed, but this machine is not set up for a cluster; choose cluster=local"
        )
    return SlurmError(f"SLURM refused {command[0]}: {reason}")
