"""Replay buffers in RAM, on a device or on disk, and stores of offline ``episodes``.

May import top-level modules and ``memory``; ``episodes`` also uses the types of the task registry. Names are loaded on
first use, so that modules that only handle files do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_torchrl.data.replay import SliceStartSampler, TrajectoryReplay
    from pwm_torchrl.data.segments import SegmentStore
    from pwm_torchrl.memory.storage import replay_bytes, replay_disk_bytes, steps_since_checkpoint

__all__ = [
    "SegmentStore",
    "SliceStartSampler",
    "TrajectoryReplay",
    "replay_bytes",
    "replay_disk_bytes",
    "steps_since_checkpoint",
]

_HOME = {
    "SegmentStore": "pwm_torchrl.data.segments",
    "SliceStartSampler": "pwm_torchrl.data.replay",
    "TrajectoryReplay": "pwm_torchrl.data.replay",
    "replay_bytes": "pwm_torchrl.memory.storage",
    "replay_disk_bytes": "pwm_torchrl.memory.storage",
    "steps_since_checkpoint": "pwm_torchrl.memory.storage",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
