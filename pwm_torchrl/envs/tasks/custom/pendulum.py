"""A pendulum that spins. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import pendulum
from dm_control.utils import rewards

__all__ = ["spin"]

_TIME_LIMIT = 20.0  # seconds
_SPEED = 9.0


def spin(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Turn fast, in either direction; see :class:`SpinningPendulum`."""
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return control.Environment(physics, SpinningPendulum(random=random), time_limit=time_limit)


class SpinningPendulum(pendulum.SwingUp):
    """Rewards speed of rotation: 1 from 9 rad/s on, 0.5 at 4.5 rad/s, 0 at rest."""

    def get_reward(self, physics: pendulum.Physics) -> float:
        return rewards.tolerance(
            np.linalg.norm(physics.angular_velocity()),
            bounds=(_SPEED, float("inf")),
            margin=_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
