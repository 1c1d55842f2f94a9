"""Walkers that go backwards. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any

from dm_control.rl import control
from dm_control.suite import walker
from dm_control.utils import rewards

from pwm_torchrl.envs.tasks.custom.model import physics_of, stock_model, widen_floor

__all__ = ["run_backwards", "walk_backwards"]

_TIME_LIMIT = 25.0  # seconds
_CONTROL_TIMESTEP = 0.025
_STAND_HEIGHT = 1.2
_WALK_SPEED, _RUN_SPEED = 1.0, 8.0


def walk_backwards(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Stand upright and walk backwards at 1 m/s or faster; see :class:`BackwardsWalker`."""
    return _environment(_WALK_SPEED, time_limit, random)


def run_backwards(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Stand upright and run backwards at 8 m/s or faster; see :class:`BackwardsWalker`."""
    return _environment(_RUN_SPEED, time_limit, random)


def _environment(speed: float, time_limit: float, random: Any) -> control.Environment:
    model = stock_model("walker")
    widen_floor(model, "floor", "500")
    return control.Environment(
        physics_of(walker.Physics, model),
        BackwardsWalker(speed, random=random),
        time_limit=time_limit,
        control_timestep=_CONTROL_TIMESTEP,
    )


class BackwardsWalker(walker.PlanarWalker):
    """Rewards standing, and six times as much of it for moving backwards at the wanted speed.

    With tol(x, lo, hi) 1 inside the bounds and falling outside of them: S (5 M + 1) / 6, where S = (3 tol(torso height,
    1.2 m, ∞) + (1 + upright) / 2) / 4 and M = tol(horizontal velocity, −∞, −speed), which falls linearly to 0 when the
    walker stands still.
    """

    def get_reward(self, physics: walker.Physics) -> float:
        standing = rewards.tolerance(
            physics.torso_height(), bounds=(_STAND_HEIGHT, float("inf")), margin=_STAND_HEIGHT / 2
        )
        stand = (3 * standing + (1 + physics.torso_upright()) / 2) / 4
        move = rewards.tolerance(
            physics.horizontal_velocity(),
            bounds=(-float("inf"), -self._move_speed),
            margin=self._move_speed / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return stand * (5 * move + 1) / 6
