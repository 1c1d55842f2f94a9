"""Cheetahs that run backwards, on one foot, or jump. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import cheetah
from dm_control.utils import rewards

from pwm_torchrl.envs.tasks.custom.model import physics_of, stock_model, widen_floor

__all__ = ["jump", "run_back", "run_backwards", "run_front"]

_TIME_LIMIT = 10.0  # seconds
_BACKWARDS_SPEED = 8.0
_ONE_FOOT_SPEED = 6.0
_HEIGHT = 1.2


def run_backwards(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run backwards at 8 m/s or faster; see :class:`BackwardsCheetah`."""
    return _environment(BackwardsCheetah(random=random), time_limit)


def run_front(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run on the front foot, the back foot in the air; see :class:`OneFootCheetah`."""
    return _environment(OneFootCheetah("bfoot", random=random), time_limit)


def run_back(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run on the back foot, the front foot in the air; see :class:`OneFootCheetah`."""
    return _environment(OneFootCheetah("ffoot", random=random), time_limit)


def jump(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Be high above the ground without getting anywhere; see :class:`JumpingCheetah`."""
    return _environment(JumpingCheetah(random=random), time_limit)


def _environment(task: cheetah.Cheetah, time_limit: float) -> control.Environment:
    model = stock_model("cheetah")
    widen_floor(model, "ground", "200")
    return control.Environment(physics_of(cheetah.Physics, model), task, time_limit=time_limit)


class BackwardsCheetah(cheetah.Cheetah):
    """Rewards speed backwards: 1 from 8 m/s on, in proportion below, 0 for standing still or running forwards."""

    def get_reward(self, physics: cheetah.Physics) -> float:
        return rewards.tolerance(
            physics.speed(),
            bounds=(-float("inf"), -_BACKWARDS_SPEED),
            margin=_BACKWARDS_SPEED,
            value_at_margin=0,
            sigmoid="linear",
        )


class OneFootCheetah(cheetah.Cheetah):
    """Rewards a foot and the torso in the air, and six times as much of it for running forwards.

    With tol(x, lo, hi) 1 inside the bounds and falling outside of them: U (5 V + 1) / 6, where U = (3 tol(foot height,
    1.2 m, ∞) + 2 tol(torso height, 1.2 m, ∞)) / 5 and V = tol(speed, 6 m/s, ∞), linear from 0 at standing still.

    Args:
        foot (str): the foot in the air, ``"bfoot"`` or ``"ffoot"``.
        random: as for the stock task. Defaults to ``None``.
    """

    def __init__(self, foot: str, random: Any = None) -> None:
        super().__init__(random=random)
        self._foot = foot

    def get_reward(self, physics: cheetah.Physics) -> float:
        up = (3 * _high(_z(physics, self._foot)) + 2 * _high(_z(physics, "torso"))) / 5
        run = rewards.tolerance(
            physics.speed(),
            bounds=(_ONE_FOOT_SPEED, float("inf")),
            margin=_ONE_FOOT_SPEED,
            value_at_margin=0,
            sigmoid="linear",
        )
        return up * (5 * run + 1) / 6


class JumpingCheetah(cheetah.Cheetah):
    """Rewards height of torso and feet, and staying where it is.

    With tol(x, lo, hi) 1 inside the bounds and falling outside of them, the mean over both feet of (5 tol((torso height
    + foot height) / 2, 1.2 m, ∞) + tol(speed, −0.5 m/s, 0.5 m/s)) / 6, the latter linear to 0 at 1 m/s.
    """

    def get_reward(self, physics: cheetah.Physics) -> float:
        torso = _z(physics, "torso")
        up = np.mean([_high((torso + _z(physics, foot)) / 2) for foot in ("bfoot", "ffoot")])
        still = rewards.tolerance(physics.speed(), bounds=(-0.5, 0.5), margin=0.5, value_at_margin=0, sigmoid="linear")
        return (5 * up + still) / 6


def _z(physics: cheetah.Physics, body: str) -> float:
    return physics.named.data.xpos[body, "z"]


def _high(height: float) -> float:
    return rewards.tolerance(height, bounds=(_HEIGHT, float("inf")), margin=_HEIGHT / 2)
