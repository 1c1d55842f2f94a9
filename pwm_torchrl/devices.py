"""Where networks and environments live."""

from __future__ import annotations

import torch

from pwm_torchrl.errors import ConfigurationError


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ConfigurationError: for an unknown device or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(
            f"device={name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices."
        )
    return device
