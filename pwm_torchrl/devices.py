"""Where networks and environments live."""

from __future__ import annotations

import torch

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError


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
