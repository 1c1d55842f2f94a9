"""Which runs a report is of: ``--where``, ``--newest``, and what to add where a comparison is ambiguous."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pwm_torchrl.choices import nearest_sentence, schema_keys
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import RunReport, natural
from pwm_torchrl.report.pairing import Ambiguous, Pairs, pair_runs, typed_value
from pwm_torchrl.run.directory import settings_of

__all__ = ["Condition", "newest", "pair_or_advise", "select"]

#: What tables name, beside dotted keys of the configuration.
SHORT = ("env", "model", "size", "seed", "status")
_SHOWN = 8  # values named in a sentence, at most
_STEPS = 6  # options proposed for an ambiguous comparison, at most


@dataclass(frozen=True)
class Condition:
    """``KEY=VALUE``, ``KEY=VALUE,VALUE`` or ``KEY!=VALUE`` as it was typed.

    Attributes:
        key: one of :data:`SHORT`, or a dotted key of the configuration.
        values: those that it may have.
        negated: whether it may have all but those.
    """

    key: str
    values: tuple[str, ...]
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            ConfigurationError: if it is none.
        """
        key, equals, value = text.partition("=")
        if not equals or not key.rstrip("!") or not value:
            raise ConfigurationError(f"--where {text}: write KEY=VALUE, KEY=VALUE,VALUE or KEY!=VALUE")
        values = (value,) if value.startswith("[") else tuple(value.split(","))
        return cls(key.removesuffix("!"), values, key.endswith("!"))

    def __str__(self) -> str:
        return f"{self.key}{'!=' if self.negated else '='}{','.join(self.values)}"

    def holds(self, run: RunReport) -> bool:
        """Whether a run is meant; one whose configuration cannot be read has no dotted keys."""
        there, value = _look_up(run, self.key)
        return (there and any(_equal(value, asked) for asked in self.values)) != self.negated


def select(runs: Sequence[RunReport], conditions: Iterable[Condition], only_newest: bool = False) -> list[RunReport]:
    """The runs that meet all conditions; of several conditions on one key, one of those without ``!=`` is enough.

    Args:
        runs: the runs.
        conditions: from ``--where``.
        only_newest: whether :func:`newest` is applied to what is left. Defaults to ``False``.

    Raises:
        ConfigurationError: if a key is unknown, no run has a value, or no run is left.
    """
    conditions = list(conditions)
    wanted: dict[str, list[Condition]] = {}
    for condition in conditions:
        _check(condition, runs)
        if not condition.negated:
            wanted.setdefault(condition.key, []).append(condition)
    unwanted = [condition for condition in conditions if condition.negated]
    left = [
        run
        for run in runs
        if all(condition.holds(run) for condition in unwanted)
        and all(any(condition.holds(run) for condition in several) for several in wanted.values())
    ]
    if not left:
        raise ConfigurationError(f"no run is left of {len(runs)}: no run has {_words(conditions)} together")
    return newest(left) if only_newest else left


def newest(runs: Sequence[RunReport]) -> list[RunReport]:
    """Of runs with the same settings and seed the one that was started last of those that finished, or of all if none
    has. Runs without a readable configuration are kept.
    """
    best: dict[str, RunReport] = {}
    for run in runs:
        key = _settings(run)
        other = best.setdefault(key, run)
        if (run.finished, run.started, run.name) > (other.finished, other.started, other.name):
            best[key] = run
    return [run for run in runs if best[_settings(run)] is run]


def pair_or_advise(
    runs: Sequence[RunReport],
    key: str,
    baseline: str | None,
    allow_differences: bool,
    compose: Callable[[Sequence[str]], Config] | None = None,
) -> Pairs:
    """As :func:`~pwm_torchrl.report.pairing.pair_runs`; if that is ambiguous, the error says what to add.

    Raises:
        ConfigurationError: as there.
    """

    def pair(some: Sequence[RunReport]) -> Pairs:
        return pair_runs(some, key, baseline, allow_differences, compose)

    try:
        return pair(runs)
    except Ambiguous as ambiguous:
        found = _narrow(runs, key, pair)
        if found is None:
            how = "leave all but one of them out with --where KEY=VALUE, or name the runs to compare"
        else:
            conditions, only_newest, count = found
            words = [*(["--newest"] if only_newest else []), *([_words(conditions)] if conditions else [])]
            how = f"add {' '.join(words)} (leaves {count} of {len(runs)} runs)"
        if not ambiguous.repeated:
            how += ", or accept it with --allow-differences"
        raise ConfigurationError(f"{ambiguous}; {how}") from ambiguous


def _narrow(
    runs: Sequence[RunReport], key: str, pair: Callable[[Sequence[RunReport]], Pairs]
) -> tuple[list[Condition], bool, int] | None:
    """Conditions, whether only the newest, and how many runs are left, with which a comparison is not ambiguous.

    What is ambiguous is settled one by one, each by the option that leaves most to compare; ``None`` if that fails.
    """
    conditions: list[Condition] = []
    only_newest = False
    for _ in range(_STEPS):
        left = select(runs, conditions, only_newest)
        try:
            pair(left)
            return conditions, only_newest, len(left)
        except Ambiguous as error:
            ambiguous = error
        except ConfigurationError:
            return None
        if not ambiguous.keys:
            if only_newest:
                return None
            only_newest = True
            continue
        options = [option for option in _options(left, ambiguous, key) if option not in conditions]
        rated = []
        for place, option in enumerate(options):
            some = [run for run in left if option.holds(run)]
            if some and not all(option.holds(run) for run in ambiguous.runs):
                rated.append((_comparable(some, key), sum(run.finished for run in some), -place, option))
        if not rated:
            return None
        conditions.append(max(rated, key=lambda each: each[:3])[3])
    return None


def _options(runs: Sequence[RunReport], ambiguous: Ambiguous, key: str) -> Iterator[Condition]:
    """What could tell the runs of an ambiguity apart, the plainest first."""
    if not all(run.finished for run in ambiguous.runs):
        yield Condition("status", ("finished",))
    sections = {found.partition(".")[0] for found in ambiguous.keys}
    short = [name for name in ("model", "size") if name in sections and name != key]
    for name in [*short, *ambiguous.keys]:
        values = [_look_up(run, name)[1] for run in ambiguous.runs]
        for text in dict.fromkeys(map(typed_value, values)):
            yield Condition(name, (text,))


def _comparable(runs: Iterable[RunReport], key: str) -> int:
    """How many seeds of environments have runs of at least two values of a key."""
    cells: dict[tuple[str, Any], set[str]] = {}
    for run in runs:
        cells.setdefault((str(run.env), run.seed), set()).add(typed_value(_look_up(run, key)[1]))
    return sum(len(values) > 1 for values in cells.values())


def _check(condition: Condition, runs: Sequence[RunReport]) -> None:
    """Raises if a key is unknown, or no run has the value that is asked for."""
    key = condition.key
    if key not in SHORT and key not in schema_keys() and not any(_look_up(run, key)[0] for run in runs):
        known = [*SHORT, *schema_keys(), *(f"env.{name}" for name in _env_keys(runs))]
        raise ConfigurationError(f"--where {condition}: unknown key{nearest_sentence(key, known)}")
    if condition.negated:
        return
    there = [value for known, value in (_look_up(run, key) for run in runs) if known]
    if there and all(isinstance(value, dict) for value in there):
        example = next(iter(there[0]), "KEY")
        raise ConfigurationError(f"--where {condition}: {key} is a section; name a key of it, such as {key}.{example}")
    for asked in condition.values:
        if not any(_equal(value, asked) for value in there):
            found = sorted({typed_value(value) for value in there}, key=natural)
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            listed = ", ".join(found[:_SHOWN]) + more if found else "no values"
            raise ConfigurationError(
                f"--where {key}={asked}: no run has it; there are {listed}{nearest_sentence(asked, found)}"
            )


def _env_keys(runs: Iterable[RunReport]) -> list[str]:
    return list(dict.fromkeys(name for run in runs if run.config is not None for name in run.config.env))


def _look_up(run: RunReport, key: str) -> tuple[bool, Any]:
    """Whether a run has a key, and its value."""
    if key in SHORT:
        value = getattr(run, key)
        return value is not None, value
    if run.config is None:
        return False, None
    value = run.config
    for part in key.split("."):
        if isinstance(value, dict):
            if part not in value:
                return False, None
            value = value[part]
        elif hasattr(value, part) and not part.startswith("_"):
            value = getattr(value, part)
        else:
            return False, None
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    return True, value


def _equal(value: Any, asked: str) -> bool:
    """Whether a value is what somebody typed: as text, as a number, or as YAML."""
    if asked in (str(value), typed_value(value)):
        return True
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(asked) == value
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        return bool(yaml.safe_load(asked) == value)
    return False


def _settings(run: RunReport) -> str:
    """Equal for runs of the same settings and seed."""
    if run.config is None:
        return str(run.path)
    settings: Mapping[str, Any] = settings_of(run.config)
    return repr(sorted(settings.items()))


def _words(conditions: Iterable[Condition]) -> str:
    return " ".join(f"--where {shlex.quote(str(condition))}" for condition in conditions)
