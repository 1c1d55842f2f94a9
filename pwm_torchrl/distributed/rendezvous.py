"""This process's rank and the address of rank 0, read from the launcher's environment variables.

Kept apart from ``ranks`` because commands that only ask for the rank should not import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

#: Set by torchrun, or by hand when ranks are started without it.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Set in submitit's jobs.
SUBMITIT = "SUBMITIT_EXECUTOR"


@dataclass(frozen=True)
class Rendezvous:
    """Identifies one of the processes that train a run and how it reaches the others.

    Rank 0 executes the run; the other ranks compute shares of its updates.
    """

    rank: int
    size: int  # number of processes
    local_rank: int  # rank among the processes of this node
    address: str  # host of rank 0
    port: int

    def export(self) -> None:
        """Set the environment variables that :mod:`torch.distributed` reads."""
        values = (str(self.rank), str(self.size), self.address, str(self.port))
        os.environ.update(zip(VARIABLES, values, strict=True))


def find_rendezvous() -> Rendezvous | None:
    """This process's rank and rendezvous; ``None`` if it is the only process of the run.

    Raises:
        ConfigurationError: if the environment variables are incomplete or invalid.
    """
    found = _from_torchrun() if "WORLD_SIZE" in os.environ else _from_submitit()
    return None if found is None or found.size == 1 else found


def is_replica() -> bool:
    """Whether this process is a rank other than 0, which computes for rank 0 and writes no files."""
    found = find_rendezvous()
    return found is not None and found.rank > 0


def _from_torchrun() -> Rendezvous:
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    try:
        rank, size = int(values["RANK"] or 0), int(values["WORLD_SIZE"])
        port = int(values["MASTER_PORT"] or 0)
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise ConfigurationError(
            f"RANK, WORLD_SIZE, MASTER_PORT and LOCAL_RANK must be whole numbers: {error}; torchrun sets them."
        ) from error
    missing = [name for name, value in values.items() if not value]
    if size > 1 and missing:
        raise ConfigurationError(
            f"WORLD_SIZE={size} means several processes, but {', '.join(missing)} is not set; torchrun sets them."
        )
    if not 0 <= rank < max(1, size):
        raise ConfigurationError(f"RANK={rank} is not one of 0 to WORLD_SIZE - 1 = {size - 1}.")
    return Rendezvous(rank, size, local_rank, values["MASTER_ADDR"], port)


def _from_submitit() -> Rendezvous | None:
    if SUBMITIT not in os.environ:
        return None
    try:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment
    except ImportError as error:
        raise MissingLibraryError(
            f"{SUBMITIT} is set, but submitit is not installed: pip install 'pwm-torchrl[launch]'."
        ) from error
    try:
        job = JobEnvironment()
        tasks = job.num_tasks
    except (
        RuntimeError
    ):  # the variable is left over and this is not a submitit job, for example with its debug executor
        return None
    if tasks == 1:  # TorchDistributedEnvironment would ask SLURM for node names
        return None
    found = TorchDistributedEnvironment()
    # The node's own name may not resolve; ranks on one node do not need it.
    address = "127.0.0.1" if job.num_nodes == 1 else found.master_addr
    return Rendezvous(found.rank, found.world_size, found.local_rank, address, found.master_port)
