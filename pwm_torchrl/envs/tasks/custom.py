"""The eleven tasks that TD-MPC2 added to the DeepMind Control suite.

Imports dm_control; only :func:`~pwm_torchrl.envs.tasks.make_custom_dm_control_env` loads this module. Each task is a
function ``DOMAIN_TASK``, similar to the suite's own tasks.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
from dm_control.rl import control
from dm_control.suite import ball_in_cup, base, cheetah, common, hopper, pendulum, reacher, walker
from dm_control.utils import rewards

# Changes to the suite's models ----------------------------------------------------------------------------------------


def stock_model(domain: str) -> ElementTree.Element:
    """The suite's model of a domain, as an XML tree that can be changed."""
    return ElementTree.fromstring(common.read_model(f"{domain}.xml"))


def element(model: ElementTree.Element, tag: str, name: str) -> ElementTree.Element:
    """The element of a model with a given tag and name.

    Raises:
        LookupError: if there is none, because dm_control has another version.
    """
    found = model.find(f".//{tag}[@name='{name}']")
    if found is None:
        raise LookupError(f"dm_control's model has no {tag} called {name!r}: install dm_control==1.0.28")
    return found


def widen_floor(model: ElementTree.Element, name: str, length: str) -> None:
    """Change the first half size of a floor plane, for tasks that run backwards."""
    floor = element(model, "geom", name)
    floor.set("size", " ".join([length, *floor.attrib["size"].split()[1:]]))


def physics_of(kind: Any, model: ElementTree.Element) -> Any:
    """An instance of a domain's ``Physics`` class from a changed model."""
    return kind.from_xml_string(ElementTree.tostring(model, encoding="unicode"), common.ASSETS)


# Walker ---------------------------------------------------------------------------------------------------------------

_WALKER_TIME_LIMIT = 25.0  # seconds
_WALKER_CONTROL_TIMESTEP = 0.025
_WALKER_STAND_HEIGHT = 1.2
_WALK_SPEED, _RUN_SPEED = 1.0, 8.0


def walker_walk_backwards(time_limit: float = _WALKER_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Stand upright and walk backwards at 1 m/s or faster; see :class:`BackwardsWalker`."""
    return _walker_environment(_WALK_SPEED, time_limit, random)


def walker_run_backwards(time_limit: float = _WALKER_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Stand upright and run backwards at 8 m/s or faster; see :class:`BackwardsWalker`."""
    return _walker_environment(_RUN_SPEED, time_limit, random)


def _walker_environment(speed: float, time_limit: float, random: Any) -> control.Environment:
    model = stock_model("walker")
    widen_floor(model, "floor", "500")
    return control.Environment(
        physics_of(walker.Physics, model),
        BackwardsWalker(speed, random=random),
        time_limit=time_limit,
        control_timestep=_WALKER_CONTROL_TIMESTEP,
    )


class BackwardsWalker(walker.PlanarWalker):
    """Rewards standing, with six times the reward for moving backwards at the desired speed.

    With tol(x, lo, hi) 1 inside the bounds and falling outside of them: S (5 M + 1) / 6, where S = (3 tol(torso height,
    1.2 m, ∞) + (1 + upright) / 2) / 4 and M = tol(horizontal velocity, −∞, −speed), which is linear and 0 at a velocity
    of 0.
    """

    def get_reward(self, physics: walker.Physics) -> float:
        standing = rewards.tolerance(
            physics.torso_height(), bounds=(_WALKER_STAND_HEIGHT, float("inf")), margin=_WALKER_STAND_HEIGHT / 2
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


# Cheetah --------------------------------------------------------------------------------------------------------------

_CHEETAH_TIME_LIMIT = 10.0  # seconds
_CHEETAH_BACKWARDS_SPEED = 8.0
_CHEETAH_ONE_FOOT_SPEED = 6.0
_CHEETAH_HEIGHT = 1.2


def cheetah_run_backwards(time_limit: float = _CHEETAH_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run backwards at 8 m/s or faster; see :class:`BackwardsCheetah`."""
    return _cheetah_environment(BackwardsCheetah(random=random), time_limit)


def cheetah_run_front(time_limit: float = _CHEETAH_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run on the front foot, the back foot in the air; see :class:`OneFootCheetah`."""
    return _cheetah_environment(OneFootCheetah("bfoot", random=random), time_limit)


def cheetah_run_back(time_limit: float = _CHEETAH_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Run on the back foot, the front foot in the air; see :class:`OneFootCheetah`."""
    return _cheetah_environment(OneFootCheetah("ffoot", random=random), time_limit)


def cheetah_jump(time_limit: float = _CHEETAH_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Be high above the ground without moving forwards; see :class:`JumpingCheetah`."""
    return _cheetah_environment(JumpingCheetah(random=random), time_limit)


def _cheetah_environment(task: cheetah.Cheetah, time_limit: float) -> control.Environment:
    model = stock_model("cheetah")
    widen_floor(model, "ground", "200")
    return control.Environment(physics_of(cheetah.Physics, model), task, time_limit=time_limit)


class BackwardsCheetah(cheetah.Cheetah):
    """Rewards backward speed: 1 from 8 m/s, proportional below, 0 for standing still or running forwards."""

    def get_reward(self, physics: cheetah.Physics) -> float:
        return rewards.tolerance(
            physics.speed(),
            bounds=(-float("inf"), -_CHEETAH_BACKWARDS_SPEED),
            margin=_CHEETAH_BACKWARDS_SPEED,
            value_at_margin=0,
            sigmoid="linear",
        )


class OneFootCheetah(cheetah.Cheetah):
    """Rewards a raised foot and torso, with six times the reward for running forwards.

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
        up = (3 * _cheetah_high(_cheetah_z(physics, self._foot)) + 2 * _cheetah_high(_cheetah_z(physics, "torso"))) / 5
        run = rewards.tolerance(
            physics.speed(),
            bounds=(_CHEETAH_ONE_FOOT_SPEED, float("inf")),
            margin=_CHEETAH_ONE_FOOT_SPEED,
            value_at_margin=0,
            sigmoid="linear",
        )
        return up * (5 * run + 1) / 6


class JumpingCheetah(cheetah.Cheetah):
    """Rewards the height of torso and feet, and a speed near 0.

    With tol(x, lo, hi) 1 inside the bounds and falling outside of them, the mean over both feet of (5 tol((torso height
    + foot height) / 2, 1.2 m, ∞) + tol(speed, −0.5 m/s, 0.5 m/s)) / 6, the latter linear to 0 at 1 m/s.
    """

    def get_reward(self, physics: cheetah.Physics) -> float:
        torso = _cheetah_z(physics, "torso")
        up = np.mean([_cheetah_high((torso + _cheetah_z(physics, foot)) / 2) for foot in ("bfoot", "ffoot")])
        still = rewards.tolerance(physics.speed(), bounds=(-0.5, 0.5), margin=0.5, value_at_margin=0, sigmoid="linear")
        return (5 * up + still) / 6


def _cheetah_z(physics: cheetah.Physics, body: str) -> float:
    return physics.named.data.xpos[body, "z"]


def _cheetah_high(height: float) -> float:
    return rewards.tolerance(height, bounds=(_CHEETAH_HEIGHT, float("inf")), margin=_CHEETAH_HEIGHT / 2)


# Hopper ---------------------------------------------------------------------------------------------------------------

_HOPPER_TIME_LIMIT = 20.0  # seconds
_HOPPER_CONTROL_TIMESTEP = 0.02
_HOPPER_STAND_HEIGHT = 0.6
_HOPPER_HOP_SPEED = 1.0


def hopper_hop_backwards(time_limit: float = _HOPPER_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Hop backwards at 1 m/s or faster; see :class:`BackwardsHopper`."""
    return control.Environment(
        hopper.Physics.from_xml_string(*hopper.get_model_and_assets()),
        BackwardsHopper(hopping=True, random=random),
        time_limit=time_limit,
        control_timestep=_HOPPER_CONTROL_TIMESTEP,
    )


class BackwardsHopper(hopper.Hopper):
    """Rewards backward speed while standing: 0 unless the torso is 0.6 to 2 m above the foot; then 1 from 1 m/s, 0.5 at
    0.5 m/s and 0 when standing still.
    """

    def get_reward(self, physics: hopper.Physics) -> float:
        standing = rewards.tolerance(physics.height(), (_HOPPER_STAND_HEIGHT, 2))
        hopping = rewards.tolerance(
            physics.speed(),
            bounds=(-float("inf"), -_HOPPER_HOP_SPEED),
            margin=_HOPPER_HOP_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return standing * hopping


# Reacher --------------------------------------------------------------------------------------------------------------

_REACHER_TIME_LIMIT = 20.0  # seconds
_BIG_TARGET, _SMALL_TARGET = 0.05, 0.015
_REACHER_LINK = "0.09"
_REACHER_RANGE = "-80 80"  # degrees, of the second and the third joint


def reacher_three_easy(time_limit: float = _REACHER_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Reach a target of 5 cm: 1 while the finger touches it, else 0."""
    return _reacher_environment(_BIG_TARGET, time_limit, random)


def reacher_three_hard(time_limit: float = _REACHER_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Reach a target of 1.5 cm: 1 while the finger touches it, else 0."""
    return _reacher_environment(_SMALL_TARGET, time_limit, random)


def _reacher_environment(target_size: float, time_limit: float, random: Any) -> control.Environment:
    physics = physics_of(reacher.Physics, three_links())
    return control.Environment(physics, reacher.Reacher(target_size, random=random), time_limit=time_limit)


def three_links() -> ElementTree.Element:
    """The stock model with another link between arm and hand, and all three shorter."""
    model = stock_model("reacher")
    model.set("model", "three-link planar reacher")
    arm, hand = element(model, "body", "arm"), element(model, "body", "hand")
    element(model, "geom", "arm").set("fromto", f"0 0 0 {_REACHER_LINK} 0 0")
    element(model, "joint", "wrist").set("range", _REACHER_RANGE)
    element(model, "body", "finger").set("pos", f"{_REACHER_LINK} 0 0")
    hand.set("pos", f"{_REACHER_LINK} 0 0")

    arm.remove(hand)
    forearm = ElementTree.SubElement(arm, "body", name="forearm", pos=f"{_REACHER_LINK} 0 0")
    link = {**element(model, "geom", "arm").attrib, "name": "forearm"}
    ElementTree.SubElement(forearm, "geom", link)
    ElementTree.SubElement(forearm, "joint", name="elbow", limited="true", range=_REACHER_RANGE)
    forearm.append(hand)

    motors = model.find("actuator")
    assert motors is not None
    motors.insert(1, ElementTree.Element("motor", name="elbow", joint="elbow"))
    return model


# Ball in cup ----------------------------------------------------------------------------------------------------------

_BALL_IN_CUP_TIME_LIMIT = 20.0  # seconds
_BALL_IN_CUP_CONTROL_TIMESTEP = 0.02
_BALL_IN_CUP_DISTANCE = 0.5
_BALL_IN_CUP_SPEED = 6.0
_BALL_IN_CUP_ANYWHERE = 0.1  # fraction of episodes that may start outside the cup


def ball_in_cup_spin(time_limit: float = _BALL_IN_CUP_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Swing the ball on its string around the cup; see :class:`SpinningBall`."""
    return control.Environment(
        ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets()),
        SpinningBall(random=random),
        time_limit=time_limit,
        control_timestep=_BALL_IN_CUP_CONTROL_TIMESTEP,
    )


class SpinningBall(ball_in_cup.BallInCup):
    """Rewards a fast ball far from the cup; 0 while it is inside.

    With tol(x, lo, hi) 1 inside the bounds and falling linearly outside of them: (D + 2 W) / 3 outside the cup, where
    D = tol(distance of ball and target, 0.5 m, ∞), 0.5 at half the distance, and W = tol(norm of the velocities of
    ball_x and ball_z, 6 m/s, ∞), 0.5 at half the speed. Most episodes start with the ball in the cup.
    """

    def initialize_episode(self, physics: ball_in_cup.Physics) -> None:
        anywhere = self.random.uniform() < _BALL_IN_CUP_ANYWHERE
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
            bounds=(_BALL_IN_CUP_DISTANCE, float("inf")),
            margin=_BALL_IN_CUP_DISTANCE / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        fast = rewards.tolerance(
            np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]]),
            bounds=(_BALL_IN_CUP_SPEED, float("inf")),
            margin=_BALL_IN_CUP_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return (1 - physics.in_target()) * (far + 2 * fast) / 3


# Pendulum -------------------------------------------------------------------------------------------------------------

_PENDULUM_TIME_LIMIT = 20.0  # seconds
_PENDULUM_SPEED = 9.0


def pendulum_spin(time_limit: float = _PENDULUM_TIME_LIMIT, random: Any = None) -> control.Environment:
    """Turn fast, in either direction; see :class:`SpinningPendulum`."""
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return control.Environment(physics, SpinningPendulum(random=random), time_limit=time_limit)


class SpinningPendulum(pendulum.SwingUp):
    """Rewards the speed of rotation: 1 from 9 rad/s, 0.5 at 4.5 rad/s, 0 at rest."""

    def get_reward(self, physics: pendulum.Physics) -> float:
        return rewards.tolerance(
            np.linalg.norm(physics.angular_velocity()),
            bounds=(_PENDULUM_SPEED, float("inf")),
            margin=_PENDULUM_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
