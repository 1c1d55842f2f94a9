"""The choices and keys of the configuration: the files of ``configs/``, the user's own profiles, the schema's keys."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import pwm_torchrl
from pwm_torchrl import config as schema
from pwm_torchrl.config import Config, Rule, Section, SizeConfig, missing_keys
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "add_profile_to_errors",
    "choice_file",
    "configs_dir",
    "default_choices",
    "exact_choice",
    "flatten_keys",
    "group_choices",
    "key_comments",
    "missing_profile_keys",
    "nearest",
    "nearest_sentence",
    "profile_keys",
    "schema_choices",
    "schema_keys",
    "sizes",
    "user_configs_dir",
    "user_profiles",
]

CONFIG_DIR_VARIABLE = "PWM_TORCHRL_CONFIG_DIR"


def configs_dir() -> Path:
    """The folder with ``config.yaml``: in a wheel beside the modules, in a checkout at the top.

    Raises:
        ConfigurationError: if neither exists.
    """
    package = Path(pwm_torchrl.__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigurationError(f"the folder configs/ with config.yaml is missing beside {package}; reinstall pwm-torchrl")


def user_configs_dir() -> Path:
    """The folder with the user's or the site's own cluster profiles, ``cluster/NAME.yaml``; it may not exist.

    It is ``$PWM_TORCHRL_CONFIG_DIR`` if set, else ``pwm_torchrl`` in ``$XDG_CONFIG_HOME`` or ``~/.config``.
    """
    given = os.environ.get(CONFIG_DIR_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser().absolute() / "pwm_torchrl"


def user_profiles() -> dict[str, Path]:
    """The files of the user's own cluster profiles, by name."""
    return {file.stem: file for file in sorted((user_configs_dir() / "cluster").glob("*.yaml"))}


def group_choices() -> dict[str, list[str]]:
    """All config groups with their choices, including the user's own profiles, in the order of the help."""
    order = ["model", "size", "env", "experiment", "algorithm", "logger", "cluster", "memory"]
    folder = configs_dir()
    found = {p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.yaml"))}
    names = [g for g in order if g in found] + sorted(found - set(order))
    choices = {g: {p.stem for p in (folder / g).glob("*.yaml")} for g in names}
    choices["cluster"] |= user_profiles().keys()
    return {g: sorted(found, key=_by_number) for g, found in choices.items()}


def choice_file(group: str, choice: str) -> Path:
    """The file of a choice."""
    own = user_profiles().get(choice) if group == "cluster" else None
    return own if own is not None else configs_dir() / group / f"{choice}.yaml"


def default_choices() -> dict[str, str]:
    """The default choice of every group, as listed in ``config.yaml``."""
    listed = yaml.safe_load((configs_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in listed if isinstance(entry, dict) for pair in entry.items()]
    return {group: choice for group, choice in pairs if choice is not None}


def exact_choice(value: str, choices: Iterable[str]) -> str | None:
    """The choice that ``value`` names. Case is ignored if no choice matches exactly.

    Returns:
        str or None: the choice; ``None`` if none or several match.
    """
    choices = list(choices)
    if value in choices:
        return value
    alike = [choice for choice in choices if choice.casefold() == value.casefold()]
    return alike[0] if len(alike) == 1 else None


def _by_number(name: str) -> tuple[Any, ...]:
    """Sort key: names without a leading number come first, then 5m before 19m."""
    digits = name[: len(name) - len(name.lstrip("0123456789"))]
    return (int(digits) if digits else -1, name)


def schema_keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a schema dataclass with their types; the type of a section is its dataclass."""
    return {prefix + key: hint for key, hint in _keys(cls)}


@functools.cache
def _keys(cls: type) -> tuple[tuple[str, Any], ...]:
    """Several passes over the schema ask for every word of a command line, and type hints take long to resolve."""
    keys: list[tuple[str, Any]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        keys.append((field.name, hint))
        if dataclasses.is_dataclass(hint):
            keys.extend((f"{field.name}.{key}", inner) for key, inner in _keys(typing.cast(type, hint)))
    return tuple(keys)


def schema_choices() -> dict[str, tuple[str, ...]]:
    """The dotted keys that accept only certain strings, with these strings."""
    return dict(_choices())


@functools.cache
def _choices() -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((key, rule.choices) for key, rule in _rules(Config).items() if rule.choices)


def _rules(cls: type[Section]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            rules.update(_rules(hint))
        elif "rule" in field.metadata:
            rules[cls.key + field.name] = field.metadata["rule"]
    return rules


def key_comments() -> dict[str, str]:
    """The documentation of each dotted key: the comment beside its field in the schema."""
    source = inspect.getsource(schema)
    lines, said = source.splitlines(), {}
    sections = {cls.__name__: cls.key for cls in vars(schema).values() if isinstance(cls, type) and hasattr(cls, "key")}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in sections:
            continue
        for field in node.body:
            if (
                not isinstance(field, ast.AnnAssign)
                or not isinstance(field.target, ast.Name)
                or field.target.id == "key"
            ):
                continue
            first = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()
            below = itertools.takewhile(lambda line: line.startswith("    # "), lines[field.end_lineno :])
            words = [line.strip().removeprefix("#").strip() for line in (first, *below)]
            said[sections[node.name] + field.target.id] = " ".join(filter(None, words))
    return said


def sizes() -> dict[str, SizeConfig]:
    """The sizes in ``configs/size``, by name."""
    files = {name: choice_file("size", name) for name in group_choices()["size"]}
    return {
        name: SizeConfig(**yaml.safe_load(file.read_text(encoding="utf-8"))["size"]) for name, file in files.items()
    }


def nearest(value: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The choices most similar to ``value``, best first. Case is ignored.

    The last part of a dotted key is first compared with the keys of the same section. If none is similar, the whole key
    is compared with all keys, and then its last part with the last parts of all keys.
    """
    folded = {choice.casefold(): choice for choice in choices}
    value = value.casefold()
    section, dot, leaf = value.rpartition(".")
    siblings = {c.rpartition(".")[2]: c for c in folded if dot and c.rpartition(".")[0] == section}
    close = [siblings[m] for m in difflib.get_close_matches(leaf, siblings, n=n, cutoff=0.6)]
    if not close:
        close = difflib.get_close_matches(value, folded, n=n, cutoff=0.7 if dot else 0.6)
    if not close:
        leaves = {c.rpartition(".")[2]: c for c in reversed(folded)}
        close = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=n, cutoff=0.75)]
    return [folded[each] for each in dict.fromkeys(close)]


def nearest_sentence(value: str, choices: Iterable[str]) -> str:
    """The nearest choices as text, ``"; nearest: a, b"``; empty if none is similar."""
    close = nearest(value, choices)
    return f"; nearest: {', '.join(close)}" if close else ""


# The user's own cluster profiles --------------------------------------------------------------------------------------


def flatten_keys(key: str, value: Any) -> dict[str, Any]:
    """A dotted key and its value; the parts of a section under their own dotted keys."""
    if not isinstance(value, dict):
        return {key: value}
    below = (flatten_keys(f"{key}.{name}" if key else str(name), part) for name, part in value.items())
    return {leaf: part for found in below for leaf, part in found.items()}


def profile_keys(name: str) -> dict[str, Any]:
    """The keys that a user's cluster profile sets, with their values; empty for a packaged profile."""
    return next((keys for _, keys in _files_of(name)), {})


def missing_profile_keys(name: str) -> dict[str, Path]:
    """The keys that the files of a user's cluster profile leave open with ``???``, each with its file.

    Keys that another of these files sets are left out.
    """
    files = list(_files_of(name))
    given = {key for _, keys in files for key, value in keys.items() if not missing_keys(value)}
    return {
        key: file for file, keys in files for key, value in keys.items() if missing_keys(value) and key not in given
    }


def _files_of(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file of a user's cluster profile and the user's other files in its defaults, each with the keys it sets."""
    places = [f"cluster/{name}"]
    for place in places:
        file, group = user_configs_dir() / f"{place}.yaml", place.rpartition("/")[0]
        if not file.is_file():  # a packaged one
            continue
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            continue
        listed = content.pop("defaults", None)
        for entry in listed if isinstance(listed, list) else ():  # composing reports defaults that are not a list
            chosen = entry.items() if isinstance(entry, dict) else [("", entry)]
            # ``base``, ``/cluster/base``, ``/cluster: base`` or ``override /cluster: base``
            named_there = ["/".join([*str(of).split()[-1:], str(choice)]) for of, choice in chosen]
            found = [each[1:] if each.startswith("/") else f"{group}/{each}" for each in named_there]
            places += [each for each in found if each not in places]
        package = re.match(r"\s*#\s*@package\s+(\S+)", text)
        written = "_group_" if package is None else package[1]
        yield file, flatten_keys({"_global_": "", "_group_": group.replace("/", ".")}.get(written, written), content)


def _own_profile(words: Sequence[str]) -> Path | None:
    """The file of the user's cluster profile that the words of a run choose; ``None`` if they choose none."""
    chosen = [word.partition("=")[2] for word in words if word.partition("=")[0] == "cluster"]
    profiles = user_profiles()
    name = exact_choice(chosen[-1].strip("'\""), profiles) if chosen else None
    return None if name is None else profiles[name]


@contextlib.contextmanager
def add_profile_to_errors(runs: Iterable[Sequence[str]]) -> Iterator[None]:
    """Adds the file name to errors in the block that are about the content of a user's cluster profile.

    Args:
        runs (iterable of sequences of str): the words of each run.
    """
    try:
        yield
    except ConfigurationError as error:
        file = next(filter(None, (_file_meant(str(error), words) for words in runs)), None)
        if file is not None and str(file) not in str(error):
            error.args = (f"{error} ({file.parent.name}={file.stem} is {file})",)
        raise


def _file_meant(message: str, words: Sequence[str]) -> Path | None:
    """The user's profile file that a message is about; ``None`` if there is none.

    The message must mention the profile, or a key that the file sets and the words do not.
    """
    profile = _own_profile(words)
    if profile is None:
        return None
    typed = {word.partition("=")[0].lstrip("+~") for word in words}
    try:
        files = list(_files_of(profile.stem))
    except (OSError, ValueError, yaml.YAMLError):  # a file cannot be read, which is probably the error
        return profile
    for file, keys in files:
        subjects = "|".join(map(re.escape, [*(keys.keys() - typed), f"{file.parent.name}={file.stem}"]))
        if re.search(rf"(?<![\w.])({subjects})(?![\w.-]*\w)", message):
            return file
    return None
