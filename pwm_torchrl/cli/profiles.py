"""The user's own cluster profiles: the keys that their files set or leave open, and errors that name the file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pwm_torchrl.choices import exact_choice, user_configs_dir, user_profiles
from pwm_torchrl.config import missing_keys
from pwm_torchrl.errors import ConfigurationError

__all__ = ["add_profile_to_errors", "flatten_keys", "missing_profile_keys", "profile_keys"]


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
