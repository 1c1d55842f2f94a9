"""Replay of collected trajectories, in RAM, on a device or on disk. Imports nothing of the package but errors."""

from pwm_torchrl.data.replay import SliceStartSampler, TrajectoryReplay
from pwm_torchrl.data.segments import SegmentStore
from pwm_torchrl.data.sizes import replay_bytes, replay_disk_bytes, steps_since_checkpoint

__all__ = [
    "SegmentStore",
    "SliceStartSampler",
    "TrajectoryReplay",
    "replay_bytes",
    "replay_disk_bytes",
    "steps_since_checkpoint",
]
