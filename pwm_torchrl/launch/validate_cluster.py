"""Checks of a cluster profile: what SLURM would refuse, or take and never run."""

from __future__ import annotations

import math
import re

from pwm_torchrl.cluster.slurm import to_minutes
from pwm_torchrl.config import ClusterConfig
from pwm_torchrl.errors import ConfigurationError

__all__ = ["check_cluster", "read_time"]

GIB = 2**30
_NAMES = ("partition", "account", "qos")


def read_time(cluster: ClusterConfig) -> None:
    """Moves ``cluster.time`` into ``cluster.time_min``.

    Raises:
        ConfigurationError: if it is not a time limit, or ``time_min`` says otherwise.
    """
    if cluster.time is None:
        return
    # YAML reads an unquoted 24:00:00 as the number 86400: plain numbers are refused, for they may be such.
    try:
        minutes = None if cluster.time.isdecimal() else to_minutes(cluster.time)
    except ValueError:
        minutes = None
    if minutes is None:
        raise ConfigurationError(
            f"cluster.time={cluster.time} is not a time limit; write hours:minutes:seconds in quotes, as in "
            '"24:00:00" or "1-12:00:00", or set cluster.time_min in minutes'
        )
    if cluster.time_min not in (None, minutes):
        raise ConfigurationError(
            f'cluster.time="{cluster.time}" and cluster.time_min={cluster.time_min} differ; set one of them'
        )
    cluster.time, cluster.time_min = None, minutes


def check_cluster(cluster: ClusterConfig) -> None:
    """Checks the keys of a profile against each other.

    Raises:
        ConfigurationError: for the first thing found wrong.
    """
    for key in _NAMES:
        value = getattr(cluster, key)
        if value is not None and not re.fullmatch(r"[\w.@+-]+(,[\w.@+-]+)*", value):
            raise ConfigurationError(
                f"cluster.{key}={value!r} is not a name that SLURM could have; set its {key}, or null"
            )
    for key in ("constraint", "gres", "comment"):
        value = getattr(cluster, key)
        if value is not None and (not value.strip() or "\n" in value):
            raise ConfigurationError(f"cluster.{key}={value!r} is not one line of text; set it, or null")
    if cluster.kind == "slurm":
        _check_gpus(cluster)
    ceiling = None if cluster.host_gb is None else cluster.host_gb * 1e9 / GIB
    if cluster.mem_gb is not None and ceiling is not None and cluster.mem_gb > ceiling:
        raise ConfigurationError(
            f"cluster.mem_gb={cluster.mem_gb:g} (GiB) is more than a job may have on a node, "
            f"cluster.host_gb={cluster.host_gb:g} (GB); use cluster.mem_gb={math.floor(ceiling * 100) / 100:g} or less"
        )
    longest = min((t for t in (cluster.time_min, cluster.max_time_min) if t is not None), default=None)
    if longest is not None and cluster.signal_delay_s >= longest * 60:
        raise ConfigurationError(
            f"cluster.signal_delay_s={cluster.signal_delay_s} is not shorter than a job, {longest} min "
            "(cluster.time_min, cluster.max_time_min): it would be told to save as soon as it starts"
        )


def _check_gpus(cluster: ClusterConfig) -> None:
    if cluster.gpu is not None and not cluster.gpus and cluster.gres is None:
        raise ConfigurationError(
            f"cluster.gpus=0 asks for no GPU, but cluster.gpu={cluster.gpu} plans with one; set cluster.gpus=1, or "
            "cluster.gpu=null"
        )
    if cluster.gpus and cluster.gpu is None:
        raise ConfigurationError(
            f"cluster.gpus={cluster.gpus} needs the type of GPU for the memory plan; set cluster.gpu, such as "
            "cluster.gpu=l40s"
        )
    if cluster.gres is not None and not re.search(r"(^|,)gpu[:=]", cluster.gres) and cluster.gpu is not None:
        raise ConfigurationError(
            f"cluster.gres={cluster.gres} asks for no GPU, but cluster.gpu={cluster.gpu} plans with one; write it as "
            "gpu:TYPE:NUMBER, or set cluster.gpu=null"
        )
