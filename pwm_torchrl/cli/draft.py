"""A cluster profile drafted from what SLURM says of one partition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from pwm_torchrl.choices import configs_dir, user_configs_dir
from pwm_torchrl.cluster.slurm import Node, Partition, Site
from pwm_torchrl.commands import named, typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.readings import gpu_bytes

__all__ = ["draft_profile", "profile_file", "write_profile"]


def profile_file(name: str) -> Path:
    """Where a profile of the user's own is kept.

    Raises:
        ConfigurationError: if the name cannot be one, or is a packaged profile's.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(f"--draft {name!r} is not a name of letters, digits, '_', '-' and '.'; choose another")
    if (configs_dir() / "cluster" / f"{name}.yaml").exists():
        raise ConfigurationError(f"--draft {name} is a profile of pwm_torchrl; choose another name, such as my_{name}")
    return user_configs_dir() / "cluster" / f"{name}.yaml"


def write_profile(file: Path, text: str, *, force: bool) -> None:
    """Writes a profile; one that is there is kept unless ``force`` says otherwise.

    Raises:
        ConfigurationError: if there is one, or it cannot be written.
    """
    if file.exists() and not force:
        raise ConfigurationError(f"{file} exists; --force writes over it, or --draft another name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be written: {error.strerror}; set PWM_TORCHRL_CONFIG_DIR to another folder"
        ) from error


def draft_profile(name: str, site: Site, partition: str | None, day: date | None = None) -> str:
    """Text of a profile of the nodes of one partition.

    Where nodes differ, those with the most common kind of GPU are described, and of these the least of each thing, so
    that a job fits on any of them.

    Args:
        name (str): of the profile.
        site (Site): what SLURM has.
        partition (str, optional): ``None``: the default one.
        day (date, optional): of the draft. Defaults to today.

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
        f"# from what SLURM {site.config.version} says of {len(alike)} nodes. Change what you know better; then",
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
        raise ConfigurationError(f"SLURM has no default partition; name one, cluster.partition=..., of {names}")
    raise ConfigurationError(f"cluster.partition={name} does not exist; choose one of {names}")


def _memory(site: Site, partition: Partition, nodes: Sequence[Node]) -> list[str]:
    limits = [m for m in (partition.max_memory_mb, site.config.max_memory_mb) if m is not None]
    least = min([node.memory_mb for node in nodes] + limits)
    gib = math.floor(least / 1024 * 10) / 10
    return [f"host_gib: {gib:g}  # host memory a job may have on a node, at most, GiB: SLURM's {least} MiB"]


def _gpus(kind: str | None, kinds: Counter[str], nodes: Sequence[Node]) -> list[str]:
    cpus = min(node.cpus for node in nodes)
    if kind is None:
        return ["gpu: null  # type of the GPU: none", f"# cpus: {cpus}  # CPUs per task, of which a node has {cpus}"]
    count = min(node.gpus[kind] for node in nodes)
    lines = [_gpu_type(kind), f"gpus: 1  # GPUs per node, a task each, of which a node has {count}"]
    if len(kinds) > 1 and kind:
        lines.append(f"gres: gpu:{kind}:1  # what --gres asks for: the partition has {', '.join(sorted(kinds))}")
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
        return ["# max_time_min: 1440  # the longest limit asked for, minutes; the partition has none"]
    return [f"max_time_min: {partition.max_minutes}  # the longest limit asked for, minutes; longer runs come back"]


def _constraint(nodes: Sequence[Node]) -> list[str]:
    features = sorted({feature for node in nodes for feature in node.features})
    if not features:
        return []
    return [f"# constraint: {features[0]}  # features that a node must have, of {', '.join(features)}"]
