"""What SLURM says of its nodes."""

from __future__ import annotations

import subprocess

from pwm_torchrl.errors import ConfigurationError

_TIMEOUT_S = 20


def node_memory_mb(partition: str | None) -> int:
    """Memory in MiB that every node of a partition has, of SLURM's default partition for ``None``.

    Raises:
        ConfigurationError: if SLURM does not answer or knows no such partition.
    """
    command = ["sinfo", "--noheader", "--exact", "--format=%P|%m"]
    if partition is not None:
        command.append(f"--partition={partition}")
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"SLURM does not answer ({error}); try again, or use cluster=local") from error
    rows = [line.split("|") for line in shown.stdout.splitlines() if "|" in line]
    # The default partition is marked with an asterisk.
    found = [int(memory.rstrip("+")) for name, memory in rows if partition is not None or name.endswith("*")]
    if not found:
        asked = "has no default partition" if partition is None else f"knows no cluster.partition={partition}"
        raise ConfigurationError(
            f"SLURM {asked} ({shown.stderr.strip() or 'sinfo lists none'}); set cluster.partition, or cluster.host_gb"
        )
    return min(found)
