"""A hopper that hops backwards. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any

from dm_control.rl import control
from dm_control.suite import hopper
from dm_control.utils import rewards

__all__ = ["hop_backwards"]

_TIME_LIMIT = 20.0  # seconds
_CONTROL_TIMESTEP = 0.02
_STAND_HEIGHT = 0.6
_HOP_SPEED = 1.0


def hop_backwards(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Hop backwards at 1 m/s or faster; see :class:`BackwardsHopper`."""
    return control.Environment(
        hopper.Physics.from_xml_string(*hopper.get_model_and_assets()),
        BackwardsHopper(hopping=True, random=random),
        time_limit=time_limit,
        control_timestep=_CONTROL_TIMESTEP,
    )


class BackwardsHopper(hopper.Hopper):
    """Rewards speed backwards while standing: nothing unless the torso is 0.6 to 2 m above the foot, then 1 from 1 m/s
    on, 0.5 at 0.5 m/s and 0 at standing still.
    """

    def get_reward(self, physics: hopper.Physics) -> float:
        standing = rewards.tolerance(physics.height(), (_STAND_HEIGHT, 2))
        hopping = rewards.tolerance(
            physics.speed(),
            bounds=(-float("inf"), -_HOP_SPEED),
            margin=_HOP_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return standing * hopping
