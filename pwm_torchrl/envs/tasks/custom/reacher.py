"""Reachers with an arm of three links. Imports dm_control; loaded by the maker only."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from dm_control.rl import control
from dm_control.suite import reacher

from pwm_torchrl.envs.tasks.custom.model import element, physics_of, stock_model

__all__ = ["three_easy", "three_hard"]

_TIME_LIMIT = 20.0  # seconds
_BIG_TARGET, _SMALL_TARGET = 0.05, 0.015
_LINK = "0.09"
_RANGE = "-80 80"  # degrees, of the second and the third joint


def three_easy(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Reach a target of 5 cm: 1 while the finger touches it, else 0."""
    return _environment(_BIG_TARGET, time_limit, random)


def three_hard(time_limit: float = _TIME_LIMIT, random: Any = None) -> control.Environment:
    """Reach a target of 1.5 cm: 1 while the finger touches it, else 0."""
    return _environment(_SMALL_TARGET, time_limit, random)


def _environment(target_size: float, time_limit: float, random: Any) -> control.Environment:
    physics = physics_of(reacher.Physics, three_links())
    return control.Environment(physics, reacher.Reacher(target_size, random=random), time_limit=time_limit)


def three_links() -> ElementTree.Element:
    """The stock model with another link between arm and hand, and all three shorter."""
    model = stock_model("reacher")
    model.set("model", "three-link planar reacher")
    arm, hand = element(model, "body", "arm"), element(model, "body", "hand")
    element(model, "geom", "arm").set("fromto", f"0 0 0 {_LINK} 0 0")
    element(model, "joint", "wrist").set("range", _RANGE)
    element(model, "body", "finger").set("pos", f"{_LINK} 0 0")
    hand.set("pos", f"{_LINK} 0 0")

    arm.remove(hand)
    forearm = ElementTree.SubElement(arm, "body", name="forearm", pos=f"{_LINK} 0 0")
    link = {**element(model, "geom", "arm").attrib, "name": "forearm"}
    ElementTree.SubElement(forearm, "geom", link)
    ElementTree.SubElement(forearm, "joint", name="elbow", limited="true", range=_RANGE)
    forearm.append(hand)

    motors = model.find("actuator")
    assert motors is not None
    motors.insert(1, ElementTree.Element("motor", name="elbow", joint="elbow"))
    return model
