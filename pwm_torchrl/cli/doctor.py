"""``doctor``: checks this machine and its SLURM cluster for problems, or drafts a cluster profile."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from pwm_torchrl.choices import configs_dir, user_configs_dir, user_profiles
from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import DRAFT, FORCE
from pwm_torchrl.cli.run_requests import RunRequest
from pwm_torchrl.cluster.resources import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Node, Partition, Site, SlurmError, from_minutes, site, slurm_available
from pwm_torchrl.commands import named, typed, typed_here
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import MEMORY_FILESYSTEMS, existing, filesystem_type, free_bytes, write_durably
from pwm_torchrl.memory.readings import gpu_bytes
from pwm_torchrl.run.loggers import offline_reason, wandb_mode
from pwm_torchrl.terminal import coloured

__all__ = [
    "OK",
    "PROBLEM",
    "WARNING",
    "Finding",
    "check_disk",
    "check_gpu",
    "check_packages",
    "check_rendering",
    "check_slurm",
    "check_wandb",
    "draft_profile",
    "profile_file",
    "run",
    "write_profile",
]

OK, WARNING, PROBLEM = "ok", "warning", "problem"

#: Free space below which a run will probably not finish, and below which a replay on disk or videos may not fit.
NO_ROOM_GIB, LITTLE_ROOM_GIB = 1.0, 10.0
#: File systems that are local to one machine.
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "f2fs", "apfs")
_RENDER_TIMEOUT_S = 120
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().any(), "the picture is black"
renderer.close()
"""


@dataclass(frozen=True)
class Finding:
    """The result of a check, one line of output.

    Attributes:
        level: ``ok``, ``warning`` (works, but less well) or ``problem`` (does not work).
        subject: what was checked, in one or two words.
        text: the result, and what to do.
    """

    level: str
    subject: str
    text: str


def check_packages() -> list[Finding]:
    """Versions of Python and the main libraries, for requests for help."""
    names = ("pwm-torchrl", "torch", "torchrl", "tensordict", "submitit")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed" if name != "pwm-torchrl" else "pwm-torchrl from a checkout")
    return [Finding(OK, "versions", f"Python {platform.python_version()}, {', '.join(found)}")]


def check_gpu(config: Config, *, elsewhere: bool) -> list[Finding]:
    """Whether PyTorch can use the GPUs of this machine, if it has any.

    Args:
        config (Config): its ``device`` may require a GPU.
        elsewhere (bool): whether jobs run on other machines, so that this one does not need a GPU.
    """
    import torch

    if torch.cuda.is_available():
        return [_try_gpu(number) for number in range(torch.cuda.device_count())]
    here = _listed_gpus()
    if here:
        why = (
            f"this PyTorch, {torch.__version__}, is built without CUDA; install a CUDA build"
            if torch.version.cuda is None
            else f"PyTorch's CUDA {torch.version.cuda} does not work with this driver; update the driver"
        )
        return [Finding(PROBLEM, "GPU", f"{here[0]} was found, but {why}")]
    if config.device.startswith("cuda") and not elsewhere:
        return [
            Finding(
                PROBLEM, "GPU", f"device={config.device} needs a GPU, and this machine has none; set device=cpu or auto"
            )
        ]
    jobs = "jobs use those of the nodes" if elsewhere else "runs use the CPU"
    return [Finding(OK, "GPU", f"none on this machine; {jobs}")]


def _try_gpu(number: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(number)
    name = f"cuda:{number} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    try:
        torch.ones(8, device=f"cuda:{number}").sum().item()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Finding(
            PROBLEM,
            "GPU",
            f"a test computation on {name} failed ({reason}); free the GPU, or set another device=cuda:N",
        )
    return Finding(OK, "GPU", name)


def _listed_gpus() -> list[str]:
    """GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines if line.startswith("GPU ")]


def check_rendering() -> list[Finding]:
    """Whether MuJoCo renders without a display; checked in a child process, which a broken driver may crash."""
    if find_spec("mujoco") is None:
        return [
            Finding(OK, "rendering", "MuJoCo is not installed; pip install 'pwm-torchrl[mujoco]' where it is needed")
        ]
    chosen = os.environ.get("MUJOCO_GL")
    failures = {}
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        reason = _rendering_fault(backend)
        if reason is None and (chosen or backend == "egl"):
            return [Finding(OK, "rendering", f"MuJoCo renders without a display, MUJOCO_GL={backend}")]
        if reason is None:
            text = "MuJoCo renders with OSMesa, not EGL; export MUJOCO_GL=osmesa before starting, or install libegl1"
            return [Finding(WARNING, "rendering", text)]
        failures[backend] = reason
    said = "; ".join(f"{backend}: {reason}" for backend, reason in failures.items())
    advice = "install libegl1, or libosmesa6 with MUJOCO_GL=osmesa, or set training.video=false"
    if chosen:  # dm_control then fails on import, not only in rendering
        return [Finding(PROBLEM, "rendering", f"MUJOCO_GL={chosen} does not work ({said}); unset it, or {advice}")]
    return [Finding(WARNING, "rendering", f"MuJoCo cannot render here ({said}); {advice}")]


def _rendering_fault(backend: str) -> str | None:
    """Why MuJoCo does not render with a backend; ``None`` if it does."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", _RENDER]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_RENDER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no image within {_RENDER_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    # The first error is the cause; later ones come from destructors.
    lines = [line for line in done.stderr.splitlines() if ("Error" in line or "error" in line) and line[:1].strip()]
    return lines[0][:160] if lines else f"exit code {done.returncode}"


def check_disk(folder: Path, *, elsewhere: bool) -> list[Finding]:
    """Whether the file system of the runs is writable, permanent, shared with other machines, and has enough space.

    Args:
        folder (Path): folder in which runs are created; it need not exist yet.
        elsewhere (bool): whether jobs run on other machines, which need access to it.
    """
    place = existing(folder)
    kind = filesystem_type(folder) or "unknown"
    where = f"runs_dir={folder} ({kind})"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor_") as probe:
            write_durably(Path(probe) / "file", "x")
        free = free_bytes(folder)
    except OSError as error:
        text = f"{where} cannot be written: {error.strerror or error}; set runs_dir to another folder"
        return [Finding(PROBLEM, "disk", text)]
    findings = []
    if kind in MEMORY_FILESYSTEMS:
        findings.append(
            Finding(
                PROBLEM,
                "disk",
                f"{where} is RAM, and its files are lost when the machine restarts; set runs_dir to a disk",
            )
        )
    elif elsewhere and kind in _OF_ONE_MACHINE:
        text = f"{where} is usually local to this machine; set runs_dir to a folder that the nodes share"
        findings.append(Finding(WARNING, "disk", text))
    room = f"{free / 2**30:.1f} GiB free"
    if free < NO_ROOM_GIB * 2**30:
        findings.append(Finding(PROBLEM, "disk", f"{where}: {room}; free space or set runs_dir to another disk"))
    elif free < LITTLE_ROOM_GIB * 2**30:
        text = f"{where}: {room}; a replay on disk may need more, {named('plan')} shows how much"
        findings.append(Finding(WARNING, "disk", text))
    elif not findings:
        findings.append(Finding(OK, "disk", f"{where}: {room}, not counting quotas"))
    return findings


def check_wandb(config: Config) -> list[Finding]:
    """Whether Weights & Biases could log online."""
    mode = wandb_mode(config.logger)
    asked = config.logger.kind == "wandb" and mode != "disabled"
    if find_spec("wandb") is None:
        if asked:
            return [Finding(PROBLEM, "W&B", "logger=wandb needs wandb: pip install 'pwm-torchrl[wandb]'")]
        return [Finding(OK, "W&B", "not installed, and not needed")]
    reason = offline_reason()
    if reason is None:
        return [Finding(OK, "W&B", "key found, server reachable")]
    if not asked:
        return [Finding(OK, "W&B", f"not needed; it would log offline because {reason}")]
    if mode == "online":
        return [Finding(PROBLEM, "W&B", f"logger.mode=online, but {reason}; log in, or set logger.mode=auto")]
    if mode == "offline":
        return [Finding(OK, "W&B", "logs offline, as set in logger.mode; `wandb sync` uploads the logs")]
    return [Finding(WARNING, "W&B", f"it will log offline because {reason}; `wandb sync` uploads the logs later")]


_SUBJECT = "SLURM"


def check_slurm(profile: ClusterConfig, *, available: bool) -> list[Finding]:
    """Checks the cluster, each of its partitions, and whether the profile fits them.

    Args:
        profile (ClusterConfig): the profile of the jobs.
        available (bool): whether this machine belongs to a cluster.
    """
    if not available:
        if profile.kind == "slurm":
            text = f"cluster={profile.name} needs SLURM, which was not found on this machine; choose cluster=local"
            return [Finding(PROBLEM, _SUBJECT, text)]
        return [Finding(OK, _SUBJECT, "not found; jobs run on this machine")]
    try:
        here = site()
    except SlurmError as error:
        return [Finding(PROBLEM, _SUBJECT, str(error))]
    findings = [_cluster(here), *(_partition(here, partition) for partition in here.partitions)]
    if not here.config.accounting:
        text = (
            f"no accounting: SLURM forgets a job {here.config.remembers_s} s after its end, so the state of runs is "
            "read from their directories"
        )
        findings.append(Finding(OK, _SUBJECT, text))
    if profile.kind in ("slurm", "auto"):
        file = user_profiles().get(profile.name)
        label = f"cluster={profile.name}" + ("" if file is None else f" ({file})")
        findings += [Finding(WARNING, "profile", f"{label}: {doubt}") for doubt in _doubts(profile, here)]
        reason = why_impossible(JobRequest.of(profile), here)
        if reason is not None:
            findings.append(Finding(PROBLEM, "profile", f"{label}: {reason}"))
        else:
            findings.append(Finding(OK, "profile", f"{label} fits {_partition_of(profile, here)}"))
    return findings


def _doubts(profile: ClusterConfig, here: Site) -> list[str]:
    """Differences between the nodes that a profile describes and those of its partition, which make plans wrong."""
    names = profile.partition.split(",") if profile.partition else [p.name for p in here.partitions if p.default]
    nodes = [node for node in here.nodes if set(names) & set(node.partitions)]
    if not nodes:
        return []
    doubts = []
    most = max(node.memory_mb for node in nodes) / 1024
    if profile.host_gib is not None and profile.host_gib > most:
        doubts.append(
            f"cluster.host_gib={profile.host_gib:g} is more than a node has, so plans may request too much; set "
            f"cluster.host_gib={math.floor(most * 10) / 10:g}"
        )
    kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
    if profile.gpu is not None and kinds and not any(_same_gpu(profile.gpu, kind) for kind in kinds):
        doubts.append(
            f"plans assume cluster.gpu={profile.gpu}, but {', '.join(names)} has {', '.join(kinds)}; set cluster.gpu"
        )
    return doubts


def _same_gpu(name: str, kind: str) -> bool:
    """Whether a GPU type of a profile may be the given type of SLURM, which each site names differently."""
    try:
        return gpu_bytes(name) == gpu_bytes(kind)
    except ValueError:
        return name.lower() in kind.lower()


def _cluster(here: Site) -> Finding:
    config = here.config
    up = sum(node.up for node in here.nodes)
    text = (
        f"{config.version}, cluster {config.cluster}: {up} of {len(here.nodes)} nodes up, arrays of at most "
        f"{config.max_array_size} jobs, a requeued job waits {config.requeue_hold_s} s"
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
    return Finding(level, _SUBJECT, f"{name}: {', '.join(parts)}{'' if partition.up else '; accepts no jobs now'}")


def _partition_of(profile: ClusterConfig, here: Site) -> str:
    if profile.partition:
        return f"partition {profile.partition}"
    return f"the default partition, {', '.join(p.name for p in here.partitions if p.default)}"


# Drafting a cluster profile from SLURM's description of a partition ---------------------------------------------------


def profile_file(name: str) -> Path:
    """The file of a user's cluster profile.

    Raises:
        ConfigurationError: if the name is invalid, or that of a packaged profile.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(f"--draft {name!r} is not a name of letters, digits, '_', '-' and '.'; choose another")
    if (configs_dir() / "cluster" / f"{name}.yaml").exists():
        raise ConfigurationError(f"--draft {name} is a profile of pwm_torchrl; choose another name, such as my_{name}")
    return user_configs_dir() / "cluster" / f"{name}.yaml"


def write_profile(file: Path, text: str, *, force: bool) -> None:
    """Writes a profile; an existing file is overwritten only with ``force``.

    Raises:
        ConfigurationError: if the file exists and ``force`` is false, or it cannot be written.
    """
    if file.exists() and not force:
        raise ConfigurationError(f"{file} exists; use --force to overwrite it, or choose another name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be written: {error.strerror}; set PWM_TORCHRL_CONFIG_DIR to another folder"
        ) from error


def draft_profile(name: str, site: Site, partition: str | None, day: date | None = None) -> str:
    """Text of a profile for the nodes of one partition.

    If nodes differ, the profile describes those with the most common type of GPU, with the minimum of each resource, so
    that a job fits on any of them.

    Args:
        name (str): name of the profile.
        site (Site): the cluster.
        partition (str, optional): ``None``: the default partition.
        day (date, optional): date of the draft. Defaults to today.

    Raises:
        ConfigurationError: if there is no such partition, or it has no nodes.
    """
    chosen = _choose(site, partition)
    nodes = [node for node in site.nodes if chosen.name in node.partitions]
    if not nodes:
        raise ConfigurationError(f"partition {chosen.name} has no nodes; set cluster.partition to another one")
    kinds = Counter(kind for node in nodes for kind in node.gpus)
    kind = kinds.most_common(1)[0][0] if kinds else None
    alike = [node for node in nodes if kind is None or kind in node.gpus]
    others = [p.name for p in site.partitions if p.name != chosen.name]
    lines = [
        f"# Partition {chosen.name} of cluster {site.config.cluster}, drafted by `{named('doctor')} --draft {name}` on "
        f"{day or date.today()}",
        f"# from the data of SLURM {site.config.version} on {len(alike)} nodes. Correct what is wrong; then",
        f"# `{typed('doctor')} cluster={name}` checks it.",
        *([f"# Other partitions: {', '.join(others)}"] if others else []),
        "kind: slurm",
        f"partition: {chosen.name}",
        *_memory(site, chosen, alike),
        *_gpus(kind, kinds, alike),
        *_time(chosen),
        "",
        "# account: my_group",
        "# qos: normal",
        *_constraint(alike),
        "# mem_gib: 32  # --mem, GiB; otherwise what the memory plan needs",
        "# signal_delay_s: 120  # seconds before the limit at which the run is told to save",
        '# setup: ["module load cuda"]  # lines of shell before the job',
        "# array_parallelism: 8  # jobs of one submission that may run at a time",
    ]
    return "\n".join(lines) + "\n"


def _choose(site: Site, name: str | None) -> Partition:
    names = ", ".join(p.name for p in site.partitions)
    for partition in site.partitions:
        if partition.name == name or (name is None and partition.default):
            return partition
    if name is None:
        raise ConfigurationError(f"SLURM has no default partition; set cluster.partition to one of {names}")
    raise ConfigurationError(f"cluster.partition={name} does not exist; choose one of {names}")


def _memory(site: Site, partition: Partition, nodes: Sequence[Node]) -> list[str]:
    limits = [m for m in (partition.max_memory_mb, site.config.max_memory_mb) if m is not None]
    least = min([node.memory_mb for node in nodes] + limits)
    gib = math.floor(least / 1024 * 10) / 10
    return [f"host_gib: {gib:g}  # maximum host memory of a job on a node, GiB: SLURM's {least} MiB"]


def _gpus(kind: str | None, kinds: Counter[str], nodes: Sequence[Node]) -> list[str]:
    cpus = min(node.cpus for node in nodes)
    if kind is None:
        return ["gpu: null  # type of the GPU: none", f"# cpus: {cpus}  # CPUs per task, of which a node has {cpus}"]
    count = min(node.gpus[kind] for node in nodes)
    lines = [_gpu_type(kind), f"gpus: 1  # GPUs per node, a task each, of which a node has {count}"]
    if len(kinds) > 1 and kind:
        lines.append(f"gres: gpu:{kind}:1  # value of --gres: the partition has {', '.join(sorted(kinds))}")
    share = max(1, cpus // count)
    return [*lines, f"cpus: {share}  # CPUs per task: one GPU's share of a node's {cpus}"]


def _gpu_type(kind: str) -> str:
    try:
        gpu_bytes(kind)
    except ValueError:
        said = f"SLURM calls it {kind}" if kind else "SLURM does not name it"
        return f"gpu: null  # type of the GPU, to be filled in, such as l40s or a100-80gb; {said}"
    return f"gpu: {kind}  # type of the GPU"


def _time(partition: Partition) -> list[str]:
    if partition.max_minutes is None:
        return ["# max_time_min: 1440  # longest time limit to request, minutes; the partition has none"]
    return [
        f"max_time_min: {partition.max_minutes}  # longest time limit to request, minutes; longer runs are requeued"
    ]


def _constraint(nodes: Sequence[Node]) -> list[str]:
    features = sorted({feature for node in nodes for feature in node.features})
    if not features:
        return []
    return [f"# constraint: {features[0]}  # features that a node must have, of {', '.join(features)}"]


# The command ----------------------------------------------------------------------------------------------------------


def run(request: RunRequest) -> int:
    """Checks the machine for the runs that a command line describes, or drafts a cluster profile.

    Returns:
        The exit code: 0, or 1 if there is a problem.
    """
    (asked,) = request.runs
    options = request.line.options
    if DRAFT in options:
        return _draft(options[DRAFT], asked.config.cluster.partition, force=FORCE in options)
    found = _check(asked.config)
    problems = sum(finding.level == PROBLEM for finding in found)
    if problems:
        console.error(f"{problems} problem{'s' * (problems > 1)}, see above")
    return console.FAILED if problems else console.OK


def _check(config: Config) -> list[Finding]:
    """Run all checks; each result is printed immediately."""
    slurm = slurm_available()
    elsewhere = config.cluster.kind == "slurm" or (config.cluster.kind == "auto" and slurm)
    checks = [
        check_packages,
        lambda: check_gpu(config, elsewhere=elsewhere),
        check_rendering,
        lambda: check_disk(Path(config.runs_dir).expanduser().absolute(), elsewhere=elsewhere),
        lambda: check_slurm(config.cluster, available=slurm),
        lambda: check_wandb(config),
    ]
    found = []
    for check in checks:
        for finding in check():
            console.say(f"{coloured(f'{finding.level:<8}')} {finding.subject:<10} {finding.text}")
            found.append(finding)
    return found


def _draft(name: str, partition: str | None, *, force: bool) -> int:
    file = profile_file(name)
    if not slurm_available():
        raise SlurmError(f"{DRAFT} {name} needs SLURM, which was not found on this machine; run it on a login node")
    text = draft_profile(name, site(), partition)
    write_profile(file, text, force=force)
    console.say(text)
    console.say(f"written: {file}\ncheck it: {typed_here('doctor')} cluster={name}")
    return console.OK
