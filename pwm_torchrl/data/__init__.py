"""Replay of collected trajectories, in RAM, on a device or on disk, and offline ``episodes`` in files of their own.

Imports nothing of the package but errors; ``episodes`` knows the task registry's types.

Names are loaded on first use: what only works with files needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_torchrl.data.layout import replay_bytes, replay_disk_bytes, steps_since_checkpoint
    from pwm_torchrl.data.replay import SliceStartSampler, TrajectoryReplay
    from pwm_torchrl.data.segments import SegmentStore

__all__ = [
    "SegmentStore",
    "SliceStartSampler",
    "TrajectoryReplay",
    "replay_bytes",
    "replay_disk_bytes",
    "steps_since_checkpoint",
]

_HOME = {
    "SegmentStore": "segments",
    "SliceStartSampler": "replay",
    "TrajectoryReplay": "replay",
    "replay_bytes": "layout",
    "replay_disk_bytes": "layout",
    "steps_since_checkpoint": "layout",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
