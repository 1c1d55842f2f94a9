"""Several runs from one command: ``seed=1,2,3 model=flow_v1,flow_v2``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.compose import PATHS, compose_unchecked
from pwm_torchrl.launch.groups import group_choices
from pwm_torchrl.launch.modes import tasks_to_extract

__all__ = ["EVERY_TASK", "expand", "values_of"]

#: A run for each task.
EVERY_TASK = "task=all"
MOST = 10_000


def expand(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of Hydra's sweeps, the last one changing fastest.

    Args:
        words (sequence of str): of the command line.

    Returns:
        list of list of str: the words of each run; one of them if nothing is swept.

    Raises:
        ConfigurationError: for a sweep without discrete values, or too many runs.
    """
    options = [_tasks(words) if word == EVERY_TASK else values_of(word) for word in words]
    count = 1
    for values in options:
        count *= len(values)
    if count > MOST:
        raise ConfigurationError(f"{count} runs in one command are more than {MOST}; submit them in parts")
    return [list(chosen) for chosen in itertools.product(*options)]


def _tasks(words: Sequence[str]) -> list[str]:
    """A word for every task that ``task=all`` means."""
    first = [values_of(word)[0] for word in words if word != EVERY_TASK]  # what else is swept has no tasks of its own
    return [f"task={name}" for name in tasks_to_extract(compose_unchecked(first))]


def values_of(word: str) -> list[str]:
    """A word for each of the values that a word gives its key."""
    key = word.partition("=")[0]
    if "=" not in word or key in (*PATHS, "tasks"):
        return [word]  # a path is text, whatever Hydra's grammar makes of its commas; tasks are one set
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException:
        return [word]  # composing tells what is wrong with it
    if not override.is_sweep_override():
        return [word]
    pattern = override.value()
    if isinstance(pattern, Glob):
        return [f"{key}={choice}" for choice in _matching(word, override.key_or_group, pattern)]
    if not override.is_discrete_sweep():
        raise ConfigurationError(f"{word!r} is an interval, not a list of values; write {key}=a,b,c or range(...)")
    return [f"{key}={_interpolated(value)}" for value in override.sweep_string_iterator()]


def _matching(word: str, group: str, pattern: Glob) -> list[str]:
    """The choices of a group that ``glob(...)`` means.

    Raises:
        ConfigurationError: if there are none.
    """
    groups = group_choices()
    found = pattern.filter(groups.get(group, []))
    if not found:
        what = f"the choices of {group}: {', '.join(groups[group])}" if group in groups else "choices of a group only"
        raise ConfigurationError(f"{word!r} matches nothing; glob(...) stands for {what}")
    return found


def _interpolated(value: str) -> str:
    """Hydra escapes the brackets of an interpolation, which is then none."""
    return re.sub(r"\\(.)", r"\1", value) if "$\\{" in value else value
