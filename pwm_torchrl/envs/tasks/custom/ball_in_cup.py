"""A ball that swings around its cup. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import ball_in_cup, base
from dm_control.utils import rewards

__all__ = ["spin"]

_TIME_LIMIT = 20.0  # seconds
_CONTROL_TIMESTEP = 0.02
_DISTANCE = 0.5
_SPEED = 6.0
_ANYWHERE = 0.1  # share of episodes that may start outside the cup


def spin(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Swing the ball on its string around the cup; see :class:`SpinningBall`."""
    return control.Environment(
        ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets()),
        SpinningBall(random=random),
        time_limit=time_limit,
        control_timestep=_CONTROL_TIMESTEP,
    )


class SpinningBall(ball_in_cup.BallInCup):
    """Rewards a fast ball far from the cup; nothing while it is inside.

    With tol(x, lo, hi) 1 inside the bounds and falling linearly outside of them: (D + 2 W) / 3 outside the cup, where
    D = tol(distance of ball and target, 0.5 m, ∞), 0.5 at half the distance, and W = tol(norm of the velocities of
    ball_x and ball_z, 6 m/s, ∞), 0.5 at half the speed. Most episodes start with the ball in the cup.
    """

    def initialize_episode(self, physics: ball_in_cup.Physics) -> None:
        anywhere = self.random.uniform() < _ANYWHERE
        wrong = True
        while wrong:
            physics.named.data.qpos["ball_x"] = self.random.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            wrong = physics.data.ncon > 0 or not (anywhere or physics.in_target())
        base.Task.initialize_episode(self, physics)

    def get_reward(self, physics: ball_in_cup.Physics) -> float:
        far = rewards.tolerance(
            np.linalg.norm(physics.ball_to_target()),
            bounds=(_DISTANCE, float("inf")),
            margin=_DISTANCE / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        fast = rewards.tolerance(
            np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]]),
            bounds=(_SPEED, float("inf")),
            margin=_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return (1 - physics.in_target()) * (far + 2 * fast) / 3
