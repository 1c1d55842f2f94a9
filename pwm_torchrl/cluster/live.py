"""Which jobs of which runs are queued or run, asked of SLURM once for all."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.cluster.record import read_job
from pwm_torchrl.errors import ConfigurationError

_TIMEOUT_S = 20
#: States of a job that is over.
ENDED = (
    "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"
)  # fmt: skip
#: Parts of the reasons for which a queued job waits for a person.
_HELD = ("held", "Held", "HoldMaxRequeue", "PartitionConfig", "BadConstraints", "AssocGrp", "QOSMax")


@dataclass(frozen=True)
class LiveJob:
    """What SLURM says of a job.

    Attributes:
        job_id (str): ``123`` or ``123_4``.
        state (str): such as ``PENDING`` or ``RUNNING``.
        reason (str): why it waits; ``None`` in SLURM's own words if it does not.
        node (str): where it runs.
    """

    job_id: str
    state: str
    reason: str = ""
    node: str = ""

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in ENDED

    @property
    def held(self) -> bool:
        """Whether it waits for a person, not for resources."""
        return self.state == "PENDING" and any(word in self.reason for word in _HELD)


def jobs(ids: Iterable[str]) -> dict[str, LiveJob]:
    """Jobs that SLURM knows, by id; one call of squeue for all.

    Raises:
        ConfigurationError: if SLURM does not answer.
    """
    wanted = sorted(set(ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    # The id twice: squeue calls a single one that it has forgotten an error.
    listed = ",".join([*wanted, wanted[0]])
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={listed}", "--format=%i|%T|%r|%N"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"SLURM does not answer ({error}); try again") from error
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise ConfigurationError(f"SLURM does not answer: {' '.join(answer.stderr.split())}; try again")
    return parse_jobs(answer.stdout)


def parse_jobs(text: str) -> dict[str, LiveJob]:
    """What squeue printed."""
    found = {}
    for line in text.splitlines():
        job_id, state, reason, node = (*line.split("|"), "", "", "")[:4]
        if re.fullmatch(r"\d+(_\d+)?", job_id):
            found[job_id] = LiveJob(job_id, state, reason, node)
    return found


def live_job(run_dir: Path) -> LiveJob | None:
    """The run's newest job if it is queued or runs.

    Raises:
        ConfigurationError: if SLURM does not answer.
    """
    ids = read_job(run_dir).get("job_ids", [])
    if not ids:
        return None
    job = jobs(ids[-1:]).get(ids[-1])
    return None if job is None or job.over else job
