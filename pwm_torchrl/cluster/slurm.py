"""What SLURM says: its commands' answers, read and parsed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pwm_torchrl.cluster.deaths import read_job
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
        raise ValueError(f"{text!r} is not a time of SLURM, such as 90, 24:00:00 or 1-12")
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


# Reading what SLURM's commands write; every function here works on text alone -----------------------------------------


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


# Asking SLURM, one command per question -------------------------------------------------------------------------------


TIMEOUT_S = 20.0
COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_UNKNOWN_JOB = ("Invalid job id", "not found")
_NO_CLUSTER = "configuration source"
_NO_ACCOUNTING = "accounting storage is disabled"


class SlurmError(ConfigurationError):
    """SLURM does not answer, or refuses; one sentence."""


def slurm_available() -> bool:
    """Whether this machine belongs to a SLURM cluster, be its controller up or down.

    Commands alone are not enough: a distribution's packages bring them to machines without a cluster.
    """
    if any(shutil.which(command) is None for command in COMMANDS):
        return False
    try:
        answer = _run(["scontrol", "ping"])
    except SlurmError:
        return True  # somebody was asked, and did not answer in time
    return _NO_CLUSTER not in answer.stderr


def ask(command: Sequence[str]) -> str:
    """Runs one of SLURM's commands.

    Args:
        command (sequence of str): the command and its arguments.

    Returns:
        str: what it wrote.

    Raises:
        SlurmError: if it is not installed, does not answer within 20 seconds or fails.
    """
    answer = _run(command)
    if answer.returncode:
        raise _failure(command, answer.stderr or answer.stdout)
    return answer.stdout


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States of jobs and of tasks of arrays, by one call of ``squeue``, and of ``sacct`` for those it has forgotten.

    Args:
        job_ids (iterable of str): ``12`` or ``12_3``; of an array's number ``12`` its tasks are told.

    Returns:
        dict: by id. What SLURM does not know, or not any more, is left out: without accounting it forgets an ended job
        after some minutes (:attr:`~pwm_torchrl.cluster.slurm.SlurmConfig.remembers_s`).

    Raises:
        SlurmError: if SLURM does not answer.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    # A single unknown id is an error to squeue, one among several is not: it is never asked for a single one.
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
    """The newest job of a run that waits, runs or comes back; ``None`` if there is none.

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
    """Change a job; what SLURM complained about, ``None`` if it did what was asked."""
    try:
        answer = _run(["scontrol", *words])
    except SlurmError as error:
        return str(error)
    return None if answer.returncode == 0 else " ".join(answer.stderr.split())


def site() -> Site:
    """Settings, partitions and nodes, by a call for each.

    Raises:
        SlurmError: if SLURM does not answer.
    """
    return Site(
        parse_config(ask(["scontrol", "show", "config"])),
        tuple(parse_partitions(ask(["scontrol", "--oneliner", "show", "partition"]))),
        tuple(parse_nodes(ask(["scontrol", "--oneliner", "show", "node"]))),
    )


def _remembered(job_ids: list[str]) -> dict[str, JobState]:
    """What accounting knows of ended jobs; nothing where there is none."""
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
            f"SLURM's command {command[0]} is not here; run this where jobs are submitted, or choose cluster=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"SLURM did not answer {command[0]} within {TIMEOUT_S:g} s; try again, or choose cluster=local"
        ) from error


def _failure(command: Sequence[str], said: str) -> SlurmError:
    lines = [line.split("error: ", 1)[-1].strip() for line in said.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(lines)) or "it says nothing"
    if "Unable to contact" in reason:
        return SlurmError(f"SLURM's controller does not answer {command[0]} ({reason}); try again when it is back")
    if _NO_CLUSTER in reason:
        return SlurmError("SLURM's commands are here, but no cluster is set up for this machine; choose cluster=local")
    return SlurmError(f"SLURM refuses {command[0]}: {reason}")
