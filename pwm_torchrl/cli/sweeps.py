"""Expands the sweeps of a command line to several runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException

from pwm_torchrl.choices import group_choices
from pwm_torchrl.errors import ConfigurationError

__all__ = ["EVERY_TASK", "PATH_KEYS", "PRETRAINING_PREFIX", "SLURM_LIST_KEYS", "SWEEP_PATTERN", "expand", "values_of"]

#: Word that stands for one run per task.
EVERY_TASK = "task=all"
#: Prefix of words that apply only to the pre-training with which ``task=all`` may begin.
PRETRAINING_PREFIX = "pretraining."
MAX_RUNS = 10_000
#: Keys whose values are comma-separated lists of SLURM; a sweep over such a key is written choice(a,b).
SLURM_LIST_KEYS = ("cluster.partition", "cluster.gres")
SWEEP_PATTERN = re.compile(r"[\w.]+=(choice|range|glob|shuffle|sort)\(")
#: Keys whose values are paths: plain text, even with characters that are special in Hydra's grammar.
PATH_KEYS = ("run_dir", "runs_dir", "world_model", "init_from", "data.path", "data.scratch_dir")


def expand(words: Sequence[str], tasks: Sequence[str] = ()) -> list[list[str]]:
    """All combinations of the values of Hydra's sweeps; the last one changes fastest.

    Args:
        words (sequence of str): words of the command line.
        tasks (sequence of str): the tasks that ``task=all`` stands for, see
            :func:`~pwm_torchrl.cli.finalize.expand_tasks`. Defaults to ``()``: ``task=all`` is left out.

    Returns:
        list of list of str: the words of each run; a single run without sweeps. With ``task=all``, ``tasks`` is left
            out unless another word refers to it.

    Raises:
        ConfigurationError: for a sweep that is continuous, infinite or empty, or for too many runs.
    """
    every = [f"task={name}" for name in tasks]
    if EVERY_TASK in words and not any("${tasks}" in word for word in words):
        words = [word for word in words if word.partition("=")[0] != "tasks"]
    options = [every if word == EVERY_TASK else values_of(word) for word in words if tasks or word != EVERY_TASK]
    count = 1
    for values in options:
        count *= len(values)
    if count > MAX_RUNS:
        raise ConfigurationError(_too_many(str(count)))
    return [list(chosen) for chosen in itertools.product(*options)]


def values_of(word: str) -> list[str]:
    """One word for each value in a word's sweep; the word itself if it is not a sweep."""
    key = word.partition("=")[0]
    if "=" not in word or key in (*PATH_KEYS, "tasks") or (key in SLURM_LIST_KEYS and not SWEEP_PATTERN.match(word)):
        return [word]  # commas in a path are plain text, and tasks are one set
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException:
        return [word]  # composing reports what is wrong with it
    if not override.is_sweep_override():
        return [word]
    pattern = override.value()
    if isinstance(pattern, Glob):
        return [f"{key}={choice}" for choice in _matching(word, override.key_or_group, pattern)]
    if not override.is_discrete_sweep():
        raise ConfigurationError(f"{word!r} is an interval, not a list of values; write {key}=a,b,c or range(...)")
    return [f"{key}={_interpolated(value)}" for value in _swept(word, override)]


def _too_many(count: str) -> str:
    return f"{count} runs in one command are more than {MAX_RUNS}; submit them in parts"


def _swept(word: str, override: Override) -> list[str]:
    """The values of a sweep, in its order.

    Raises:
        ConfigurationError: if there are none, or too many.
    """
    pattern = override.value()
    if isinstance(pattern, RangeSweep):  # count first: a range may be infinite, and a shuffled one is made as a whole
        start, stop, step = (float(each or 0) for each in (pattern.start, pattern.stop, pattern.step))
        count = (stop - start) / step if step else math.nan
        if not math.isfinite(count):
            raise ConfigurationError(f"{word!r} never ends; write range(start,stop,step) with finite numbers")
        if count > MAX_RUNS:
            raise ConfigurationError(_too_many(f"{word!r}: {math.ceil(count)}"))
    values = list(override.sweep_string_iterator())
    if not values:
        raise ConfigurationError(f"{word!r} gives {override.key_or_group} no value; write at least one")
    return values


def _matching(word: str, group: str, pattern: Glob) -> list[str]:
    """The choices of a group that ``glob(...)`` matches.

    Raises:
        ConfigurationError: if there are none.
    """
    groups = group_choices()
    found = pattern.filter(groups.get(group, []))
    if not found:
        what = f"the choices of {group}: {', '.join(groups[group])}" if group in groups else "choices of a group only"
        raise ConfigurationError(f"{word!r} matches nothing; glob(...) matches {what}")
    return found


def _interpolated(value: str) -> str:
    """Undo Hydra's escaping of the brackets of an interpolation, which would prevent its resolution."""
    return re.sub(r"\\(.)", r"\1", value) if "$\\{" in value else value
