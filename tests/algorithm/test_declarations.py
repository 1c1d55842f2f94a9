"""What the algorithms' classes declare about their settings is what commands read without importing them."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

import pytest
from training_cases import config

from pwm_torchrl.algorithm.base import Algorithm, find_algorithm, updates_of
from pwm_torchrl.algorithm.declarations import Declarations, declarations
from pwm_torchrl.algorithm.pwm import PWM
from pwm_torchrl.choices import key_comments
from pwm_torchrl.config import ALGORITHMS, AlgorithmConfig
from pwm_torchrl.errors import ConfigurationError

ATTRIBUTES = [each.name for each in fields(Declarations)]
KEYS = [each.name for each in fields(AlgorithmConfig)]


class OfNone(Algorithm):
    ignored_online = None  # type: ignore[assignment]


class OfTuple(Algorithm):
    least = ("horizon",)  # type: ignore[assignment]


class OfString(PWM):
    ignored = "lmbda"


class OfSection(PWM):
    ignored_online = ("algorithm.lmbda",)


class OfNothing(PWM):
    least: ClassVar = {"horizn": 3}


class Plain(Algorithm):
    """One that declares nothing."""


def attributes(declared: object) -> dict[str, object]:
    return {each: getattr(declared, each) for each in ATTRIBUTES}


@pytest.mark.parametrize("name", [*ALGORITHMS, *ALGORITHMS.values(), f"{__name__}.Plain"])
def test_are_the_attributes_of_the_class(name: str) -> None:
    """Those of packaged classes are read from their source."""
    assert attributes(declarations(name)) == attributes(find_algorithm(name))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_are_about_keys_that_exist(name: str) -> None:
    declared = declarations(name)
    assert {*declared.ignored, *declared.ignored_online, *declared.least} <= set(KEYS)
    assert len(set(declared.ignored)) == len(declared.ignored)
    assert not set(declared.ignored) & {*declared.ignored_online, *declared.least}


def test_every_key_is_used_by_some_algorithm() -> None:
    for key in KEYS:
        assert not all(declarations(name).ignores(key, "online") for name in ALGORITHMS), key


def test_comments_that_name_algorithms_name_those_that_use_the_key() -> None:
    named = 0
    for key in KEYS:
        beginning, colon, _ = key_comments().get(f"algorithm.{key}", "").partition(":")
        if key != "name" and colon and set(beginning.split(", ")) <= set(ALGORITHMS):
            users = {name for name in ALGORITHMS if not declarations(name).ignores(key, "pretrain")}
            assert set(beginning.split(", ")) == users, key
            named += 1
    assert named > 5


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("OfString", ["ignored='lmbda'", "a tuple"]),
        ("OfNone", ["ignored_online=None", "a tuple"]),
        ("OfTuple", ["least=('horizon',)", "a dict"]),
        ("OfSection", ["ignored_online", "'algorithm.lmbda'"]),
        ("OfNothing", ["least", "'horizn'", "nearest: horizon"]),
    ],
)
def test_a_user_is_told_of_mistakes(name: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        declarations(f"{__name__}.{name}")
    for part in (f"{__name__}.{name}", *parts):
        assert part in str(caught.value)


def test_the_smallest_values_hold_without_a_command_too() -> None:
    with pytest.raises(ConfigurationError, match=r"algorithm\.horizon=0 .*at least 1 .*algorithm\.name=pwm_paper"):
        updates_of(config({"algorithm.horizon": 0}))
    assert updates_of(config({"algorithm.horizon": 0, "algorithm.name": "pwm"}))
