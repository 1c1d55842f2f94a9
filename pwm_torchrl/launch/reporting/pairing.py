"""Which runs a comparison sets against each other: of the same environment and seed, and alike in all else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.groups import configs_dir, nearest_sentence, schema_keys
from pwm_torchrl.launch.reporting.collect import RunReport, natural
from pwm_torchrl.launch.run_dir import differing_keys

__all__ = ["Pairs", "covered_keys", "pair_runs", "value_of"]

_PAIRED_BY = ("seed", "env", "env.name", "run_dir", "runs_dir")  # what tells pairs apart cannot be compared
_SHOWN = 6  # keys or runs named in a sentence, at most


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
    runs: Sequence[RunReport], key: str, baseline: str | None = None, allow_differences: bool = False
) -> Pairs:
    """Sorts runs by the value of a key and pairs them by environment and seed.

    Args:
        runs: the runs.
        key: a dotted key of the configuration, or a group such as ``model``.
        baseline: the value that others are compared with. Defaults to the first in reading order.
        allow_differences: whether runs may differ in other keys too; then a note says in which.

    Raises:
        ConfigurationError: if the key cannot be compared, fewer than two values have a seed in common, two runs have
            the same value, environment and seed, or runs differ in other keys.
    """
    _check_key(key)
    values: dict[str, None] = {}
    sorted_runs: dict[str, dict[str, dict[int, RunReport]]] = {}
    for run in runs:
        if run.config is None:
            raise ConfigurationError(f"--compare {key}: {run.path} has no readable configuration; leave it out")
        values[value_of(run.config, key)] = None
    arms = sorted(values, key=natural)
    if len(arms) < 2:
        raise ConfigurationError(f"--compare {key}: every run has {key}={arms[0]}; give runs of two values or more")
    if baseline is not None and baseline not in arms:
        raise ConfigurationError(f"--baseline {baseline} is no value of {key} here; there are {', '.join(arms)}")
    for run in runs:
        _enter(run, key, sorted_runs)
    first = arms[0] if baseline is None else baseline
    arms.sort(key=lambda arm: arm != first)
    pairs = Pairs(key, arms, {})
    _check_differences(sorted_runs, pairs, allow_differences)
    for env in sorted(sorted_runs, key=natural):
        _pair(env, sorted_runs[env], pairs)
    if not pairs.runs:
        raise ConfigurationError(f"--compare {key}: no environment has a seed in common; {'; '.join(pairs.notes)}")
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
        differing = f" and differ in {_list(keys)}" if keys else ""
        raise ConfigurationError(
            f"--compare {key}: {other.path} and {run.path} are both {key}={value} on {run.env} with seed "
            f"{run.config.seed}{differing}; give only one of them"
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
    raise ConfigurationError(
        f"--compare {pairs.key}: runs also differ in {listed}; leave out those that do, or accept it with "
        "--allow-differences"
    )


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


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield prefix + key


def _list(words: Sequence[str]) -> str:
    more = [f"{len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join([*words[:_SHOWN], *more])
