"""Replay of collected trajectories. Imports nothing of the package but errors."""

from pwm_torchrl.data.replay import SliceStartSampler, TrajectoryReplay

__all__ = ["SliceStartSampler", "TrajectoryReplay"]
