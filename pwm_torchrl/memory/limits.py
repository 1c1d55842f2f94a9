"""Which budgets hold for a run: this machine's, a cluster profile's, or the user's."""

from __future__ import annotations

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.budget import Budget, Candidate, device_budget, host_budget
from pwm_torchrl.memory.predict import DEVICE, HOST


def budgets(cfg: Config, device: str | None) -> dict[str, Budget]:
    """Budgets by place, where the run is about to start.

    Args:
        cfg (Config): its ``memory.host_gb`` and ``memory.device_gb`` bound what the machine offers.
        device (str, optional): the CUDA device of the networks, or ``None`` on the CPU.

    Raises:
        ConfigurationError: if a variable of SLURM that tells memory makes no sense.
    """
    try:
        found = {HOST: host_budget().candidates}
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if device is not None:
        here = device_budget(device=device)
        found[DEVICE] = () if here is None else here.candidates
    return {place: _bounded(cfg, place, candidates) for place, candidates in found.items()}


def profile_budgets(cfg: Config) -> dict[str, Budget]:
    """Budgets by place of the nodes that a cluster profile describes, which need not be this machine.

    Raises:
        ConfigurationError: if the profile does not say what its nodes have, has no GPU that the run asks for, or names
            an unknown one.
    """
    profile = cfg.cluster
    if cfg.device.startswith("cuda") and profile.gpu is None:
        raise ConfigurationError(
            f"device={cfg.device} needs a GPU, and cluster={profile.name} has none; set cluster.gpu, or choose another "
            "cluster."
        )
    if profile.host_gb is None and profile.mem_gb is None and cfg.memory.host_gb is None:
        raise ConfigurationError(
            f"cluster={profile.name} does not say how much host memory its nodes have; set cluster.host_gb, "
            "cluster.mem_gb or memory.host_gb."
        )
    host = [] if profile.host_gb is None else [Candidate(int(profile.host_gb * 1e9), f"cluster={profile.name}")]
    if profile.mem_gb is not None:
        host.append(Candidate(int(profile.mem_gb * 2**30), "cluster.mem_gb"))
    found: dict[str, tuple[Candidate, ...]] = {HOST: tuple(host)}
    if profile.gpu is not None and cfg.device != "cpu":
        try:
            gpu = device_budget(profile.gpu)
        except ValueError as error:
            raise ConfigurationError(f"cluster.gpu={profile.gpu}: {error}") from error
        found[DEVICE] = () if gpu is None else gpu.candidates
    return {place: _bounded(cfg, place, candidates) for place, candidates in found.items()}


def _bounded(cfg: Config, place: str, candidates: tuple[Candidate, ...]) -> Budget:
    given = cfg.memory.host_gb if place == HOST else cfg.memory.device_gb
    if given is not None:
        candidates = (*candidates, Candidate(int(given * 1e9), f"memory.{place}_gb"))
    return Budget(candidates)
