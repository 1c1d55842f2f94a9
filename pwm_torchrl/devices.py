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
    """Make float32 PyTorch's default dtype inside the block, whatever the surrounding program has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pick_device(name: str, key: str = "device") -> torch.device:
    """The device of a configuration value; ``auto`` is CUDA if available, otherwise the CPU.

    Args:
        name (str): the value.
        key (str): its config key, for error messages. Defaults to ``"device"``.

    Raises:
        ConfigurationError: if the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"{key}={name!r} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(
            f"{key}={name!r} does not exist: PyTorch sees {torch.cuda.device_count()} CUDA devices; set {key}=cpu."
        )
    return device


def environment_device(cfg: Config) -> torch.device:
    """The device of a run's environments: ``env.device``, by default the CPU.

    Raises:
        ConfigurationError: if the device is unknown or not available.
    """
    return pick_device(str(cfg.env.get("device") or "cpu"), "env.device")


def to_device(data: Tensors, device: torch.device) -> Tensors:
    """Move ``data`` to a device. A copy from RAM to a GPU does not wait for the GPU's pending work.

    Args:
        data (Tensor or TensorDictBase): tensors that are all on one device.
        device (torch.device): the target device.
    """
    leaves = [data] if isinstance(data, Tensor) else data.values(True, True)
    if device.type != "cuda" or any(leaf.device.type != "cpu" for leaf in leaves):
        return data.to(device)
    # CUDA copies from unpinned memory synchronously.
    return data.pin_memory().to(device, non_blocking=True)


def available_cpus() -> int:
    """Number of CPUs that this process may use: the smaller of its affinity mask and its SLURM task's CPUs.

    Containers set the affinity mask; SLURM does not always. Using more threads than CPUs is slow, because they wait for
    each other: on two cores with another busy process, two threads took 11 times as long as one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(count, int(given)) if given.isdigit() and int(given) > 0 else count


def set_precision(precision: str) -> None:
    """Allow TensorFloat-32 in float32 matrix products on GPUs if the precision is ``tf32``, and forbid it otherwise.

    ``bf16`` needs no setting of the process, because the layers of the losses round the factors themselves.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_threads(threads: int | None) -> int:
    """Set the number of threads for tensor operations; ``None`` uses all available CPUs. Returns the number.

    The ranks that torchrun starts on a machine share its CPUs equally; with SLURM, each task has its own.
    """
    count = threads or max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(count)
    return count


def hardware_name(device: torch.device, threads: int) -> str:
    """Name of the GPU, or of the CPU with its threads: ``"NVIDIA H200"``, ``"Intel Xeon 6338, 8 threads"``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, name)}, {threads} thread{'s' if threads > 1 else ''}"
