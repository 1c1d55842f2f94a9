"""Selects the runs of a report, and pairs runs by seed for a comparison. Does not import pandas."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pwm_torchrl.choices import configs_dir, group_choices, nearest_sentence, schema_keys
from pwm_torchrl.commands import typed
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import RunReport, natural
from pwm_torchrl.run.directory import differing_keys, settings_of

__all__ = [
    "Ambiguous",
    "Condition",
    "Pairs",
    "covered_keys",
    "newest",
    "pair_or_advise",
    "pair_runs",
    "select",
    "typed_value",
    "value_of",
]

# Selection of runs (--where, --newest) --------------------------------------------------------------------------------


#: Short keys, accepted in addition to dotted keys of the configuration.
RUN_ATTRIBUTES = ("env", "model", "size", "seed", "status")
_NAMED = 8  # maximum number of values in a message
_STEPS = 6  # maximum number of options proposed for an ambiguous comparison


@dataclass(frozen=True)
class Condition:
    """A condition ``KEY=VALUE``, ``KEY=VALUE,VALUE`` or ``KEY!=VALUE``, as typed.

    Attributes:
        key: one of :data:`RUN_ATTRIBUTES`, or a dotted key of the configuration.
        values: accepted values.
        negated: whether ``values`` are the rejected values instead.
    """

    key: str
    values: tuple[str, ...]
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition.

        Raises:
            ConfigurationError: if the text is not a condition.
        """
        key, equals, value = text.partition("=")
        if not equals or not key.rstrip("!") or not value:
            raise ConfigurationError(f"--where {text}: write KEY=VALUE, KEY=VALUE,VALUE or KEY!=VALUE")
        values = (value,) if value.startswith("[") else tuple(value.split(","))
        return cls(key.removesuffix("!"), values, key.endswith("!"))

    def __str__(self) -> str:
        return f"{self.key}{'!=' if self.negated else '='}{','.join(self.values)}"

    def holds(self, run: RunReport) -> bool:
        """Whether a run meets the condition; a run with an unreadable configuration has no dotted keys."""
        there, value = _look_up(run, self.key)
        return (there and any(_equal(value, asked) for asked in self.values)) != self.negated


def select(runs: Sequence[RunReport], conditions: Iterable[Condition], only_newest: bool = False) -> list[RunReport]:
    """The runs that meet the conditions: all of them, except that one of several with ``=`` on the same key suffices.

    Args:
        runs: the runs.
        conditions: from ``--where``.
        only_newest: whether to apply :func:`newest` to the result. Defaults to ``False``.

    Raises:
        ConfigurationError: if a key is unknown, no run has a given value, or no run meets the conditions.
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
        raise ConfigurationError(f"none of the {len(runs)} runs matches {_words(conditions)}")
    return newest(left) if only_newest else left


def newest(runs: Sequence[RunReport]) -> list[RunReport]:
    """One run for each combination of settings and seed: of those that finished, or else of all, the one started last.
    Runs without a readable configuration are kept.
    """
    best: dict[str, RunReport] = {}
    for run in runs:
        key = _settings(run)
        other = best.setdefault(key, run)
        if (run.finished, run.started, run.name) > (other.finished, other.started, other.name):
            best[key] = run
    return [run for run in runs if best[_settings(run)] is run]


def _check(condition: Condition, runs: Sequence[RunReport]) -> None:
    """Raise ConfigurationError if a condition's key is unknown, or no run has one of its values."""
    key = condition.key
    if key not in RUN_ATTRIBUTES and key not in schema_keys() and not any(_look_up(run, key)[0] for run in runs):
        known = [*RUN_ATTRIBUTES, *schema_keys(), *(f"env.{name}" for name in _env_keys(runs))]
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
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            listed = ", ".join(found[:_NAMED]) + more if found else "no values"
            raise ConfigurationError(
                f"--where {key}={asked}: no run has this value; the runs have {listed}{nearest_sentence(asked, found)}"
            )


def _env_keys(runs: Iterable[RunReport]) -> list[str]:
    return list(dict.fromkeys(name for run in runs if run.config is not None for name in run.config.env))


def _look_up(run: RunReport, key: str) -> tuple[bool, Any]:
    """Whether a run has a key, and its value."""
    if key in RUN_ATTRIBUTES:
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
    """Whether a value equals typed text: as text, as a number, or as YAML."""
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
    """A key that is equal for runs with the same settings and seed."""
    if run.config is None:
        return str(run.path)
    settings: Mapping[str, Any] = settings_of(run.config)
    return repr(sorted(settings.items()))


def _words(conditions: Iterable[Condition]) -> str:
    return " ".join(f"--where {shlex.quote(str(condition))}" for condition in conditions)


# Pairing for a comparison: runs with the same environment and seed, and otherwise equal settings ----------------------


_PAIRED_BY = ("seed", "env", "env.name", "run_dir", "runs_dir")  # keys that cannot be compared
_SHOWN = 6  # maximum number of keys or runs in a message


class Ambiguous(ConfigurationError):
    """A comparison is ambiguous: runs repeat each other, or differ in more than the compared key.

    Attributes:
        runs: those runs.
        keys: keys in which they differ; empty if they repeat each other.
        repeated: whether they have the same value, environment and seed.
    """

    def __init__(self, message: str, runs: Sequence[RunReport], keys: Sequence[str], repeated: bool) -> None:
        super().__init__(message)
        self.runs, self.keys, self.repeated = list(runs), list(keys), repeated


@dataclass
class Pairs:
    """Runs paired for a comparison.

    Attributes:
        key: the compared key.
        arms: its values in reading order, the baseline first.
        runs: runs by environment, value and seed; within an environment, all values have the same seeds.
        notes: sentences about omitted runs and allowed differences.
    """

    key: str
    arms: list[str]
    runs: dict[str, dict[str, dict[int, RunReport]]]
    notes: list[str] = field(default_factory=list)


def pair_runs(
    runs: Sequence[RunReport],
    key: str,
    baseline: str | None = None,
    allow_differences: bool = False,
    compose: Callable[[Sequence[str]], Config] | None = None,
) -> Pairs:
    """Sort runs by the value of a key, and pair them by environment and seed.

    Args:
        runs: the runs.
        key: a dotted key of the configuration, or a group such as ``model``.
        baseline: the value that others are compared with. Defaults to the first in reading order.
        allow_differences: whether runs may differ in other keys, too; if they do, a note lists them.
        compose: composes the configuration of command-line arguments. With it, a message about a missing run gives the
            complete command for it, else only the choices of groups.

    Raises:
        Ambiguous: if two runs have the same value, environment and seed, or runs differ in other keys.
        ConfigurationError: if the key cannot be compared, or fewer than two values have a seed in common.
    """
    _check_key(key)
    unreadable = [run.name for run in runs if run.config is None]
    runs = [run for run in runs if run.config is not None]
    arms = sorted({value_of(run.config, key) for run in runs if run.config is not None}, key=natural)
    if not arms:
        raise ConfigurationError(f"--compare {key}: no run has a readable configuration")
    if len(arms) < 2:
        raise ConfigurationError(
            f"--compare {key}: every run has {key}={arms[0]}, so there is nothing to compare it with; "
            f"{_another(runs, key, compose)}"
        )
    if baseline is not None and baseline not in arms:
        raise ConfigurationError(
            f"--baseline {baseline} is not a value of {key} in these runs; choose one of {', '.join(arms)}"
        )
    sorted_runs: dict[str, dict[str, dict[int, RunReport]]] = {}
    for run in runs:
        _enter(run, key, sorted_runs)
    first = arms[0] if baseline is None else baseline
    arms.sort(key=lambda arm: arm != first)
    pairs = Pairs(key, arms, {})
    if unreadable:
        pairs.notes.append(f"left out, because the configuration cannot be read: {_list(unreadable)}")
    _check_differences(sorted_runs, pairs, allow_differences)
    for env in sorted(sorted_runs, key=natural):
        _pair(env, sorted_runs[env], pairs)
    if not pairs.runs:
        found = ", ".join(f"{key}={arm} {_seeds(sorted_runs, arm)}" for arm in arms)
        raise ConfigurationError(
            f"--compare {key}: no environment has two values with a seed in common, but runs are paired by seed; the "
            f"runs are {found}; train the missing ones"
        )
    return pairs


def value_of(config: Config, key: str) -> str:
    """A key's value as text; for a group, its name.

    Raises:
        ConfigurationError: if the configuration has no such key, or a section without a name.
    """
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        label = next((getattr(value, name) for name in ("name", "kind") if hasattr(value, name)), None)
        if label is None:
            example = f"{key}.{dataclasses.fields(value)[0].name}"
            raise ConfigurationError(f"--compare {key}: a section has many keys; name one, such as {example}")
        return str(label)
    return str(value)


def covered_keys(key: str, values: Sequence[str]) -> set[str]:
    """Prefixes of the keys in which runs may differ because they differ in ``key``.

    These are the key itself, the keys below it, and keys elsewhere that the group's files set for such a value:
    ``size=tiny``, for example, sets its own learning rates.
    """
    covered = {key}
    for value in values:
        file = configs_dir() / key / f"{value}.yaml"
        if "." not in key and file.is_file():
            import yaml

            text = file.read_text(encoding="utf-8")
            if text.startswith("# @package _global_"):
                covered.update(_leaves(yaml.safe_load(text) or {}))
    return covered


def _check_key(key: str) -> None:
    keys = schema_keys()
    if key in _PAIRED_BY:
        raise ConfigurationError(f"--compare {key}: runs are paired by environment and seed; compare another key")
    if key not in keys and not key.startswith("env."):
        raise ConfigurationError(f"--compare {key}: unknown key{nearest_sentence(key, keys)}")


def _enter(run: RunReport, key: str, runs: dict[str, dict[str, dict[int, RunReport]]]) -> None:
    """Add a run under its environment, value and seed; raise Ambiguous if there already is one."""
    assert run.config is not None
    value = value_of(run.config, key)
    other = runs.setdefault(str(run.env), {}).setdefault(value, {}).setdefault(run.config.seed, run)
    if other is not run:
        keys = [found for found, _ in _differences(other, run, set())]
        differing = f"differ in {_list(keys)}" if keys else "have the same settings"
        raise Ambiguous(
            f"--compare {key}: {other.path} and {run.path} are both {key}={value} on {run.env} with seed "
            f"{run.config.seed} and {differing}",
            [other, run],
            keys,
            repeated=True,
        )


def _check_differences(
    runs: Mapping[str, Mapping[str, Mapping[int, RunReport]]], pairs: Pairs, allow_differences: bool
) -> None:
    """Compare every run with the first of its value, and these with the first of the environment."""
    covered = covered_keys(pairs.key, pairs.arms)
    found: dict[str, str] = {}
    for arms in runs.values():
        firsts = {arm: next(iter(seeds.values())) for arm, seeds in arms.items()}
        first = firsts[next(arm for arm in pairs.arms if arm in firsts)]
        for arm, seeds in arms.items():
            for run in seeds.values():
                found.update(_differences(firsts[arm], run, set()))
            found.update(_differences(first, firsts[arm], covered))
    if not found:
        return
    listed = _list([f"{key} ({where})" for key, where in sorted(found.items())])
    if allow_differences:
        pairs.notes.append(f"runs also differ in {listed}")
        return
    several = [run for arms in runs.values() for seeds in arms.values() for run in seeds.values()]
    raise Ambiguous(f"--compare {pairs.key}: runs also differ in {listed}", several, sorted(found), repeated=False)


def _differences(first: RunReport, other: RunReport, covered: set[str]) -> Iterator[tuple[str, str]]:
    """Keys in which two runs differ but should not, with the values."""
    assert first.config is not None
    assert other.config is not None
    for key, (a, b) in differing_keys(first.config, other.config).items():
        if key != "seed" and not any(key == c or key.startswith(c + ".") for c in covered):
            yield key, f"{a} in {first.name}, {b} in {other.name}"


def _pair(env: str, arms: Mapping[str, dict[int, RunReport]], pairs: Pairs) -> None:
    """Add the runs of the seeds that every value has to ``pairs``."""
    common = set.intersection(*(set(seeds) for seeds in arms.values()))
    alone = [run for seeds in arms.values() for seed, run in seeds.items() if seed not in common or len(arms) < 2]
    if alone:
        names = _list([f"{run.name} ({run.status})" for run in alone])
        pairs.notes.append(f"{env}: left out, because there is no run of the same seed to compare with: {names}")
    missing = [arm for arm in pairs.arms if arm not in arms]
    if missing and len(arms) > 1:
        pairs.notes.append(f"{env} has no run with {pairs.key}={' or '.join(missing)}")
    if common and len(arms) > 1:
        pairs.runs[env] = {arm: {seed: arms[arm][seed] for seed in sorted(common)} for arm in pairs.arms if arm in arms}


def _seeds(runs: Mapping[str, Mapping[str, Mapping[int, RunReport]]], arm: str) -> str:
    """Environments and seeds of a value's runs: ``"on pendulum with seed 0, 1"``."""
    places = [
        f"on {env} with seed {_list([str(s) for s in sorted(arms[arm])])}" for env, arms in runs.items() if arm in arms
    ]
    return " and ".join(places)


def _another(runs: Sequence[RunReport], key: str, compose: Callable[[Sequence[str]], Config] | None) -> str:
    """The command that trains a run with another value, as part of a message."""
    choices = group_choices()
    first = runs[0]
    assert first.config is not None
    value = value_of(first.config, key)
    # MLP dynamics first, since they are the usual baseline.
    others = [each for each in sorted(choices.get(key, []), key=lambda each: each != "mlp") if each != value]
    words = [f"{key}={others[0] if others else 'VALUE'}"]
    for group in ("model", "size", "env"):
        name = str(getattr(first, group)).removesuffix("_custom")
        if group != key and name in choices[group]:
            words.append(f"{group}={name}")
    seeds = sorted({run.config.seed for run in runs if run.config is not None and run.env == first.env})
    if compose is not None:
        words += _overrides(first.config, compose(words[1:]), key)
    words += [f"seed={','.join(map(str, seeds))}"]
    return f"train one with another value, for example: {typed('submit')} {' '.join(map(shlex.quote, words))}"


def _overrides(config: Config, composed: Config, key: str) -> list[str]:
    """Arguments that turn a composed configuration into another one, except for the compared key."""
    covered = {"seed", "model.name", "size.name", "env.name", *covered_keys(key, [value_of(composed, key)])}
    return [
        f"{name}={typed_value(asked)}"
        for name, (_, asked) in differing_keys(composed, config).items()
        if not any(name == each or name.startswith(each + ".") for each in covered)
    ]


def typed_value(value: Any) -> str:
    """A value as it is typed on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(typed_value, value)) + "]" if isinstance(value, (list, tuple)) else str(value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield prefix + key


def _list(words: Sequence[str]) -> str:
    more = [f"{len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join([*words[:_SHOWN], *more])


# Advice for ambiguous comparisons -------------------------------------------------------------------------------------


def pair_or_advise(
    runs: Sequence[RunReport],
    key: str,
    baseline: str | None,
    allow_differences: bool,
    compose: Callable[[Sequence[str]], Config] | None = None,
) -> Pairs:
    """:func:`~pwm_torchrl.report.select.pair_runs`; if the comparison is ambiguous, the error says what to add.

    Raises:
        ConfigurationError: as :func:`pair_runs`.
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
    """Conditions, use of ``--newest``, and the number of remaining runs that make a comparison unambiguous.

    Resolves the ambiguities one by one, each with the option that leaves the most to compare; ``None`` if this fails.
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
    """Conditions that could distinguish the runs of an ambiguity, the simplest first."""
    if not all(run.finished for run in ambiguous.runs):
        yield Condition("status", ("finished",))
    sections = {found.partition(".")[0] for found in ambiguous.keys}
    short = [name for name in ("model", "size") if name in sections and name != key]
    for name in [*short, *ambiguous.keys]:
        values = [_look_up(run, name)[1] for run in ambiguous.runs]
        for text in dict.fromkeys(map(typed_value, values)):
            yield Condition(name, (text,))


def _comparable(runs: Iterable[RunReport], key: str) -> int:
    """Number of (environment, seed) pairs with runs of at least two values of a key."""
    cells: dict[tuple[str, Any], set[str]] = {}
    for run in runs:
        cells.setdefault((str(run.env), run.seed), set()).add(typed_value(_look_up(run, key)[1]))
    return sum(len(values) > 1 for values in cells.values())
