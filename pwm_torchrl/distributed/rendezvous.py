"""The place of this process among those that train one run, from its launcher's environment; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

#: Set by torchrun, and by whoever starts ranks by hand.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Set in the jobs of submitit.
SUBMITIT = "SUBMITIT_EXECUTOR"


@dataclass(frozen=True)
class Place:
    """One of the processes that train a run together. Rank 0 runs it; the others compute shares of its updates."""

    rank: int
    size: int  # processes in all
    local_rank: int  # among those of this node
    address: str  # where rank 0 listens
    port: int

    def export(self) -> None:
        """Set the variables from which :mod:`torch.distributed` starts."""
        values = (str(self.rank), str(self.size), self.address, str(self.port))
        os.environ.update(zip(VARIABLES, values, strict=True))


def find_place() -> Place | None:
    """This process's place among several; ``None`` if it is alone.

    Raises:
        ConfigurationError: if the environment names several processes and not which of them this is.
    """
    place = _of_variables() if "WORLD_SIZE" in os.environ else _of_submitit()
    return None if place is None or place.size == 1 else place


def is_replica() -> bool:
    """Whether this process only computes for another, which owns the run and everything that is written."""
    place = find_place()
    return place is not None and place.rank > 0


def _of_variables() -> Place:
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
            f"WORLD_SIZE={size} asks for several processes, but {', '.join(missing)} is not set; torchrun sets them."
        )
    if not 0 <= rank < max(1, size):
        raise ConfigurationError(f"RANK={rank} is not one of 0 to WORLD_SIZE - 1 = {size - 1}.")
    return Place(rank, size, local_rank, values["MASTER_ADDR"], port)


def _of_submitit() -> Place | None:
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
    except RuntimeError:  # the variable is left from a job that is none of submitit's here, such as one in-process
        return None
    if tasks == 1:  # the rest asks SLURM for the names of nodes
        return None
    found = TorchDistributedEnvironment()
    # A node's name need not lead anywhere; ranks of one node need none.
    address = "127.0.0.1" if job.num_nodes == 1 else found.master_addr
    return Place(found.rank, found.world_size, found.local_rank, address, found.master_port)
