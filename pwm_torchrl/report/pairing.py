"""Which runs a comparison sets against each other: of the same environment and seed, and alike in all else."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pwm_torchrl.choices import configs_dir, group_choices, nearest_sentence, schema_keys
from pwm_torchrl.commands import typed
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import RunReport, natural
from pwm_torchrl.run.directory import differing_keys

__all__ = ["Ambiguous", "Pairs", "covered_keys", "pair_runs", "typed_value", "value_of"]

_PAIRED_BY = ("seed", "env", "env.name", "run_dir", "runs_dir")  # what tells pairs apart cannot be compared
_SHOWN = 6  # keys or runs named in a sentence, at most


class Ambiguous(ConfigurationError):
    """Runs that a comparison cannot tell apart, or that differ in more than what is compared.

    Attributes:
        runs: those runs.
        keys: in which they differ; empty if they are repeats of each other.
        repeated: whether they have the same value, environment and seed.
    """

    def __init__(self, message: str, runs: Sequence[RunReport], keys: Sequence[str], repeated: bool) -> None:
        super().__init__(message)
        self.runs, self.keys, self.repeated = list(runs), list(keys), repeated


@dataclass
class Pairs:
    """Runs by what is compared.

    Attributes:
        key: the compared key.
        arms: its values in reading order, the baseline first.
        runs: by environment, value and seed; the same seeds for every value that an environment has.
        notes: a sentence for each run that was left out and each difference that was allowed.
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
    """Sorts runs by the value of a key and pairs them by environment and seed.

    Args:
        runs: the runs.
        key: a dotted key of the configuration, or a group such as ``model``.
        baseline: the value that others are compared with. Defaults to the first in reading order.
        allow_differences: whether runs may differ in other keys too; then a note says in which.
        compose: gives the configuration that words of a command line stand for. With it, a sentence about a missing
            run tells everything to type for it, else only the choices of groups.

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
            f"--compare {key}: every run has {key}={arms[0]}, and there is nothing to compare it with; "
            f"{_another(runs, key, compose)}"
        )
    if baseline is not None and baseline not in arms:
        raise ConfigurationError(f"--baseline {baseline} is no value of {key} here; there are {', '.join(arms)}")
    sorted_runs: dict[str, dict[str, dict[int, RunReport]]] = {}
    for run in runs:
        _enter(run, key, sorted_runs)
    first = arms[0] if baseline is None else baseline
    arms.sort(key=lambda arm: arm != first)
    pairs = Pairs(key, arms, {})
    if unreadable:
        pairs.notes.append(f"left out, for the configuration cannot be read: {_list(unreadable)}")
    _check_differences(sorted_runs, pairs, allow_differences)
    for env in sorted(sorted_runs, key=natural):
        _pair(env, sorted_runs[env], pairs)
    if not pairs.runs:
        found = ", ".join(f"{key}={arm} {_seeds(sorted_runs, arm)}" for arm in arms)
        raise ConfigurationError(
            f"--compare {key}: no environment has two values with a seed in common, and runs are paired by seed; "
            f"there are {found}; train the missing ones"
        )
    return pairs


def value_of(config: Config, key: str) -> str:
    """A key's value in words; a group's is its name.

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
    """Keys in which runs may differ because they differ in ``key``, as prefixes.

    Beside the key and what is below it these are the keys elsewhere that the files of the group set for such a value:
    ``size=tiny`` comes with learning rates of its own.
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
    """Files a run under its environment, value and seed, of which there may be one."""
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
    """Every run against the first of its value, and those against the first of the environment."""
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
    """Keys of two runs that differ and should not, with the values."""
    assert first.config is not None
    assert other.config is not None
    for key, (a, b) in differing_keys(first.config, other.config).items():
        if key != "seed" and not any(key == c or key.startswith(c + ".") for c in covered):
            yield key, f"{a} in {first.name}, {b} in {other.name}"


def _pair(env: str, arms: Mapping[str, dict[int, RunReport]], pairs: Pairs) -> None:
    """Enters the seeds that every value has."""
    common = set.intersection(*(set(seeds) for seeds in arms.values()))
    alone = [run for seeds in arms.values() for seed, run in seeds.items() if seed not in common or len(arms) < 2]
    if alone:
        names = _list([f"{run.name} ({run.status})" for run in alone])
        pairs.notes.append(f"{env}: left out, for there is no run of the same seed to compare with: {names}")
    missing = [arm for arm in pairs.arms if arm not in arms]
    if missing and len(arms) > 1:
        pairs.notes.append(f"{env} has no run with {pairs.key}={' or '.join(missing)}")
    if common and len(arms) > 1:
        pairs.runs[env] = {arm: {seed: arms[arm][seed] for seed in sorted(common)} for arm in pairs.arms if arm in arms}


def _seeds(runs: Mapping[str, Mapping[str, Mapping[int, RunReport]]], arm: str) -> str:
    """Where a value has runs: ``"on pendulum with seed 0, 1"``."""
    places = [
        f"on {env} with seed {_list([str(s) for s in sorted(arms[arm])])}" for env, arms in runs.items() if arm in arms
    ]
    return " and ".join(places)


def _another(runs: Sequence[RunReport], key: str, compose: Callable[[Sequence[str]], Config] | None) -> str:
    """How to train a run of another value, for a sentence."""
    choices = group_choices()
    first = runs[0]
    assert first.config is not None
    value = value_of(first.config, key)
    # The plain dynamics first: they are the usual baseline.
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
    """What has to be typed to get from a composed configuration to another one, the compared key apart."""
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
