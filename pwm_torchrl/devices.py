"""The device and the CPU threads of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError

Tensors = TypeVar("Tensors", Tensor, TensorDictBase)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Inside, PyTorch's default dtype is float32: a run's networks have it, whatever the program around it has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pick_device(name: str, key: str = "device") -> torch.device:
    """``auto`` is CUDA where there is one.

    Args:
        name (str): as in the configuration.
        key (str): of the configuration, for the message. Defaults to ``"device"``.

    Raises:
        ConfigurationError: for an unknown device or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"{key}={name!r} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(
            f"{key}={name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices; set {key}=cpu."
        )
    return device


def environment_device(cfg: Config) -> torch.device:
    """Where a run's environments live: the CPU, unless a simulator has a GPU of its own, ``env.device``.

    Raises:
        ConfigurationError: as :func:`pick_device`.
    """
    return pick_device(str(cfg.env.get("device") or "cpu"), "env.device")


def to_device(data: Tensors, device: torch.device) -> Tensors:
    """``data`` on a device; copying from RAM to a GPU does not wait for the work that the GPU has still to do.

    Args:
        data (Tensor or TensorDictBase): all of it on one device.
        device (torch.device): where to.
    """
    leaves = [data] if isinstance(data, Tensor) else data.values(True, True)
    if device.type != "cuda" or any(leaf.device.type != "cpu" for leaf in leaves):
        return data.to(device)
    # From memory that is not pinned, CUDA copies in step with the host.
    return data.pin_memory().to(device, non_blocking=True)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, which containers set, and what SLURM gave to its task.

    SLURM need not bind a task to its CPUs. More threads than CPUs wait for each other: two threads beside a busy
    process on two cores took 11 times as long as one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(count, int(given)) if given.isdigit() and int(given) > 0 else count


def set_precision(precision: str) -> None:
    """Let GPUs round the factors of float32 products to TensorFloat-32 with ``tf32``, and not otherwise.

    ``bf16`` is no setting of the process: the losses round by themselves.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_threads(threads: int | None) -> int:
    """Use ``threads`` for tensor operations, or as many as there are CPUs; returns the number.

    torchrun starts its ranks with the same CPUs, which they share; SLURM gives each task its own.
    """
    count = threads or max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(count)
    return count


def hardware_name(device: torch.device, threads: int) -> str:
    """The GPU, or the CPU and its threads: ``"NVIDIA H200"``, ``"Intel(R) Xeon(R) Gold 6338, 8 threads"``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, name)}, {threads} thread{'s' if threads > 1 else ''}"
