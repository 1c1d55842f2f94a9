"""Errors of Hydra and OmegaConf, retold in one sentence with the key, the value and what is
accepted.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.groups import nearest_sentence, schema_keys, user_profiles

__all__ = ["check_types", "explain", "type_words"]


def explain(error: Exception, words: list[str], env_keys: list[str]) -> ConfigurationError:
    """Builds the :class:`ConfigurationError` that tells a user what ``error`` means.

    Args:
        error: what Hydra or OmegaConf raised.
        words: the command line's words.
        env_keys: dotted keys of the chosen environment, for the nearest one.
    """
    root = _root(error)
    key = str(getattr(root, "full_key", "") or "")
    file = re.match(r"In '(\w+)/([\w.-]+)': \w+Error raised", str(error))
    place = f"{_file(*file.groups())}: " if file else ""
    if isinstance(root, (ConfigAttributeError, ConfigKeyError)) and key:
        return ConfigurationError(place + _unknown_key(key, env_keys))
    if isinstance(root, ValidationError) and key:
        return ConfigurationError(place + _wrong_type(key, root, words))
    if isinstance(root, YAMLError):
        return ConfigurationError(f"a configuration file is not readable YAML: {' '.join(str(root).split())}")
    if isinstance(root, InterpolationResolutionError):
        return ConfigurationError(f"{key} refers to a value that does not exist: {_first_line(root)}")
    return ConfigurationError(f"the configuration does not compose: {_first_line(error)}")


def type_words(hint: Any) -> str:
    """A type hint in words: ``an integer``, ``a list of numbers``, ``true or false`` ..."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    args = typing.get_args(hint)
    if type(None) in args:
        return type_words(next(a for a in args if a is not type(None))) + " or null"
    if typing.get_origin(hint) is list:
        return (
            "a list of " + {int: "integers", float: "numbers", str: "texts"}.get(args[0], "values") + ", such as [1,2]"
        )
    return names.get(hint, "a section with keys of its own")


def check_types(config: Config) -> None:
    """Lists and sections are what the schema says: OmegaConf does not look behind an interpolation that stands for one.

    Raises:
        ConfigurationError: for the first that is something else.
    """
    for key, hint in schema_keys().items():
        section = hint if dataclasses.is_dataclass(hint) else typing.get_origin(hint)
        if section not in (list, dict) and not dataclasses.is_dataclass(section):
            continue
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        fits = isinstance(value, typing.cast(type, section))
        if fits and section is list:
            element = typing.get_args(hint)[0]
            accepted = (int, float) if element is float else (element,)
            fits = all(isinstance(each, accepted) and not isinstance(each, bool) for each in value)
        if not fits:
            shown = value if isinstance(value, (str, int, float, list)) else type(value).__name__
            raise ConfigurationError(f"{key}={shown}: {str(shown)!r} is not {type_words(hint)}")


def _file(group: str, choice: str) -> str:
    own = user_profiles().get(choice) if group == "cluster" else None
    return str(own) if own is not None else f"configs/{group}/{choice}.yaml"


def _root(error: BaseException) -> BaseException:
    """The deepest OmegaConf error that names a key; Hydra wraps it into one that says less."""
    found, current = error, error.__cause__ or error.__context__
    while current is not None:
        if isinstance(current, OmegaConfBaseException) and getattr(current, "full_key", None):
            found = current
        current = current.__cause__ or current.__context__
    return found


def _unknown_key(key: str, env_keys: list[str]) -> str:
    if key.startswith("env."):
        return (
            f"unknown key {key!r}{nearest_sentence(key, env_keys)}; "
            f"to pass the environment a new argument write +{key}=VALUE"
        )
    return f"unknown key {key!r}{nearest_sentence(key, schema_keys())}"


def _wrong_type(key: str, root: ValidationError, words: list[str]) -> str:
    key = re.sub(r"\[\d+\]$", "", key)
    hint = schema_keys().get(key)
    quoted = re.search(r"Value '(.*?)'", str(root))
    given = [w for w in words if w.lstrip("+").partition("=")[0] == key]
    # A key may be given twice; the error is about one of its values.
    word = next((w for w in given if quoted and w.partition("=")[2].strip("'\"") == quoted.group(1)), None)
    word = word or next(iter(given), None)
    if word is not None:
        value = repr(word.partition("=")[2])
    else:
        value = repr(quoted.group(1)) if quoted else "its value"
    accepted = f"is not {type_words(hint)}" if hint is not None else f"does not fit ({_first_line(root)})"
    return f"{key}={value.strip(chr(39))}: {value} {accepted}" if word else f"{key}: {value} {accepted}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
