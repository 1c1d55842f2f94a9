"""Composes the words of a command line to a configuration, or raises an error that explains what is wrong."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from pwm_torchrl.choices import (
    add_profile_to_errors,
    configs_dir,
    exact_choice,
    flatten_keys,
    group_choices,
    missing_profile_keys,
    nearest_sentence,
    profile_keys,
    schema_choices,
    schema_keys,
    user_configs_dir,
    user_profiles,
)
from pwm_torchrl.cli.command_line import (
    check_settings_used,
    hydra_key_hint,
    option_hint,
    unknown_option,
)
from pwm_torchrl.cli.derived_settings import apply_mode, derive_epochs
from pwm_torchrl.cli.hydra_cache import compose_with_hydra
from pwm_torchrl.cli.sweeps import EVERY_TASK, PATH_KEYS, PRETRAINING_PREFIX, SLURM_LIST_KEYS, SWEEP_PATTERN
from pwm_torchrl.cli.validate import INTEGERS_OF_ENV, read_time, validate
from pwm_torchrl.config import RENAMED_KEYS, RENAMED_UNITS, Config, in_present_unit, missing_keys
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.terminal import warn
from pwm_torchrl.user_code import make_cwd_importable

__all__ = [
    "as_yaml",
    "check_types",
    "compose",
    "compose_onto",
    "compose_unchecked",
    "explain",
    "keys_to_use",
    "type_words",
    "typed_keys",
]


def explain(error: Exception, words: list[str], env_keys: list[str]) -> ConfigurationError:
    """Builds the :class:`ConfigurationError` that explains ``error`` to a user.

    Args:
        error: the exception of Hydra or OmegaConf.
        words: the words of the command line.
        env_keys: dotted keys of the chosen environment, from which the nearest one is suggested.
    """
    root = _root(error)
    key = str(getattr(root, "full_key", "") or "")
    file = re.search(r"\b[Ii]n '(\w+)/([\w.-]+)'", str(error))
    place = f"{_file(*file.groups())}: " if file else ""
    if isinstance(error, RecursionError):
        chosen = next((word for word in reversed(words) if word.startswith("cluster=")), "a configuration file")
        return ConfigurationError(f"{chosen}: its defaults refer back to itself; remove the entry that does")
    if isinstance(root, (ConfigAttributeError, ConfigKeyError)) and key:
        return ConfigurationError(place + _unknown_key(key, env_keys))
    if isinstance(root, ValidationError) and key:
        return ConfigurationError(place + _wrong_type(key, root, words))
    if isinstance(root, YAMLError):
        return ConfigurationError(f"a configuration file is not readable YAML: {' '.join(str(root).split())}")
    if isinstance(root, InterpolationResolutionError):
        return ConfigurationError(f"{key} refers to a value that does not exist: {_first_line(root)}")
    return ConfigurationError(f"{place}the configuration does not compose: {_first_line(error)}")


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
    """Checks the types of lists and sections, because OmegaConf does not check those that come from interpolations.

    Raises:
        ConfigurationError: for the first value of another type than in the schema.
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
    """The innermost OmegaConf error that names a key; Hydra wraps it in a less specific one."""
    found, current = error, error.__cause__ or error.__context__
    while current is not None:
        if isinstance(current, OmegaConfBaseException) and getattr(current, "full_key", None):
            found = current
        current = current.__cause__ or current.__context__
    return found


def _unknown_key(key: str, env_keys: list[str]) -> str:
    if key in RENAMED_KEYS:  # in a file, such as a user's cluster profile
        unit = f"; it is in GiB, so multiply the old value by {RENAMED_UNITS[key]:.4g}" if key in RENAMED_UNITS else ""
        return f"{key} was renamed to {' and '.join(RENAMED_KEYS[key])}{unit}"
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
    if word is None and typing.get_origin(hint) is list:  # the error does not quote a value that is not a list
        word = next((w for w in given if not w.partition("=")[2].startswith("[")), None)
    word = word or next(iter(given), None)
    if word is not None:
        value = repr(word.partition("=")[2])
    else:
        value = repr(quoted.group(1)) if quoted else "its value"
    accepted = f"is not {type_words(hint)}" if hint is not None else f"does not fit ({_first_line(root)})"
    return f"{key}={value.strip(chr(39))}: {value} {accepted}" if word else f"{key}: {value} {accepted}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


#: Keys that every environment understands, see :func:`pwm_torchrl.envs.make_env`.
KEYS_OF_ANY_ENV = ("env.terminates", "env.observation_keys", "env.name", "env.episode_length")

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError)

_TOLD: set[str] = set()  # keys of earlier versions for which a warning was given

_SYSTEMS = {"heun_k2": "flow_v1", "heun_k4": "flow_v2", "euler_k8": "flow_v3"}

_MISSING_HINTS = {
    "env.id": "for example env.id=HalfCheetah-v5",
    "env.domain": "for example env.domain=walker",
    "env.task": "for example env.task=walk",
    "env._target_": "for example env._target_=my_pkg.make_env",
}


def compose(overrides: Sequence[str] = ()) -> Config:
    """Composes a run's configuration and checks everything that needs no files, environments or torch.

    This is complete for online runs in environments of this package; for other runs,
    :func:`~pwm_torchrl.cli.finalize.finalize` does the rest.

    Args:
        overrides: words of the command line, ``group=choice`` or ``group.key=value``.

    Returns:
        The resolved configuration as an instance of the schema; ``env`` is a plain dict.

    Raises:
        ConfigurationError: for unknown choices and keys (the message names the nearest ones), wrong types, missing
            values, and values out of range.
    """
    make_cwd_importable()
    with add_profile_to_errors([overrides]):
        return _composed(overrides)


def _composed(overrides: Sequence[str]) -> Config:
    parsed = [_parse(word) for each in overrides for word in renamed(each)]
    _check_names(parsed)
    words = [*_profile_words(parsed), *_env_words(parsed)]
    composed, typed = _compose(words, parsed), _typed(parsed)
    _check_given(parsed, typed)
    resolved = _to_config(composed)
    _label_honestly(resolved, typed)
    if resolved.init_from is not None:  # so that a job, or a resume from another folder, finds it
        resolved.init_from = str(Path(resolved.init_from).expanduser().absolute())
    apply_mode(resolved, list(typed))
    read_time(resolved.cluster)
    given = {**_of_profile(parsed), **_not_referred_to(typed, overrides)}
    check_settings_used(resolved, given, model_is_known=resolved.mode != "extract")
    validate(resolved)
    derive_epochs(resolved, typed)
    return resolved


def compose_onto(stored: Config, overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Changes single keys in the configuration of an existing run.

    Args:
        stored: the run's configuration; not modified.
        overrides: words of the command line, ``group.key=value``.

    Returns:
        The configuration, without a check whether every key has an effect, and the keys that the words set with their
        values.

    Raises:
        ConfigurationError: for a choice of a group, unknown keys, wrong types and values out of range.
    """
    parsed = [_parse(word) for each in overrides for word in renamed(each)]
    _check_names(parsed)
    for o in parsed:
        if o.key_or_group in group_choices():
            raise ConfigurationError(
                f"{o.input_line}: a resumed run keeps its {o.key_or_group}; set single keys, such as "
                "cluster.mem_gib=8, or start a new run"
            )
    typed, tree = _typed(parsed), OmegaConf.structured(stored)
    try:
        for key, value in typed.items():
            OmegaConf.update(tree, key, value, force_add=key.startswith("cluster.sbatch."))
    except _COMPOSITION_ERRORS as error:
        raise explain(error, list(overrides), [f"env.{key}" for key in stored.env]) from error
    changed = _to_config(tree)
    if "cluster.time" in typed and "cluster.time_min" not in typed:
        changed.cluster.time_min = None  # both set the same limit, and the stored one is in minutes
    read_time(changed.cluster)
    validate(changed)
    return changed, typed


def compose_unchecked(overrides: Sequence[str]) -> Config:
    """Composes words without checking their combination, to find out what a sweep covers."""
    make_cwd_importable()
    parsed = [_parse(word) for each in overrides for word in renamed(each)]
    _check_names(parsed)
    return _to_config(_compose([*_profile_words(parsed), *_env_words(parsed)], parsed))


def typed_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """Every key that the words of a command line set, with its value."""
    return _typed([_parse(word) for each in overrides for word in renamed(each)])


def keys_to_use(overrides: Sequence[str]) -> dict[str, Any]:
    """:func:`typed_keys` without those to which another word refers, because these always have an effect."""
    return _not_referred_to(typed_keys(overrides), overrides)


def _not_referred_to(typed: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in typed.items() if not any(f"${{{key}}}" in word for word in overrides)}


def as_yaml(config: Config) -> str:
    """A configuration as YAML, without a newline at the end."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config))).rstrip()


def _typed(parsed: list[Override]) -> dict[str, Any]:
    """Every key of the words with its last value; a section, ``model.dynamics={kind:mlp}``, is split into its keys."""
    found: dict[str, Any] = {}
    for o in parsed:
        found |= flatten_keys(o.key_or_group, None if o.type == OverrideType.DEL else o.value())
    return found


def _parse(word: str) -> Override:
    """Parses a word and normalises the spelling of its value.

    Raises:
        ConfigurationError: for a word that is not a setting, or that is a sweep.
    """
    override = _read(word)
    if override.is_sweep_override():
        raise ConfigurationError(
            f"{word!r} asks for several runs, but this command starts one; give a single {override.key_or_group}"
        )
    if override.type == OverrideType.DEL:
        return override
    key, value, accepted = override.key_or_group, override.value(), schema_choices().get(override.key_or_group)
    if isinstance(value, float) and value.is_integer() and _is_integer(key):
        return _read(f"{word.partition('=')[0]}={int(value)}")  # 1e6
    if isinstance(value, str):
        exact = exact_choice(value, group_choices().get(key, accepted or ()))
        if exact is not None and exact != value:
            return _read(f"{word.partition('=')[0]}={exact}")  # size=5M
    return override


def renamed(word: str) -> list[str]:
    """A word with the present names of its key; for a key of an earlier version, the new name is reported once."""
    written, equal, value = word.partition("=")
    if written == "logger" and value.startswith("["):
        return _several_loggers(value)
    sign = written[: len(written) - len(written.lstrip("+"))]
    old = written[len(sign) :]
    now = RENAMED_KEYS.get(old)
    if now is None or not equal:
        return [word]
    given = value
    with suppress(ValueError):  # not a number; composing reports it if it should be one
        value = str(in_present_unit(old, float(value))) if old in RENAMED_UNITS else value
    if written not in _TOLD:
        _TOLD.add(written)
        unit = "" if value == given else f", in GiB: {old}={given} is {' and '.join(now)}={value}"
        warn(f"{old} was renamed to {' and '.join(now)}{unit}")
    return [f"{sign}{key}={value}" for key in now]


def _several_loggers(value: str) -> list[str]:
    """The words for ``logger=[tensorboard,wandb]``; Hydra composes only one choice per group."""
    names = [name for name in (each.strip().strip("'\"") for each in value.strip("[]").split(",")) if name]
    choices = group_choices()["logger"]
    for name in names or [""]:
        if name not in choices:
            raise ConfigurationError(
                f"logger={value}: {name!r} is not a choice of logger{nearest_sentence(name, choices)}\n"
                f"choices of logger: {', '.join(choices)}"
            )
    first = "wandb" if "wandb" in names else names[0]  # the configuration file of wandb has settings
    return [f"logger={first}", f"logger.also=[{','.join(name for name in names if name not in (first, 'csv'))}]"]


def _is_integer(key: str) -> bool:
    hint = schema_keys().get(key)
    return key in INTEGERS_OF_ENV or hint is int or set(typing.get_args(hint)) == {int, type(None)}


def _read(word: str) -> Override:
    if word.startswith("-"):
        raise unknown_option(word)
    if "${hydra:" in word:
        raise ConfigurationError(
            f"{word!r}: ${{hydra:...}} is not supported; refer to a key, ${{seed}}, or to an environment variable, "
            "${oc.env:HOME}"
        )
    key, equal, value = word.partition("=")
    if key == "tasks" and "," in value and value[0] not in "'\"[":
        word = f"{key}={_quoted(value)}"  # a list of names is one set of tasks, not a sweep
    listed = key in SLURM_LIST_KEYS and "," in value and not SWEEP_PATTERN.match(word)
    if (key in PATH_KEYS or listed) and value and value[0] not in "'\"" and value != "null":
        word = f"{key}={_quoted(value)}"
    if not equal and not word.startswith("~"):
        raise ConfigurationError(f"{word!r} is not a setting; write key=value, for example model=flow_v2 or seed=1")
    try:
        override: Override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise ConfigurationError(
            f"cannot read {word!r}; write key=value, and quote a value with special characters: \"{key}='...'\""
        ) from error
    return override


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _check_names(parsed: list[Override]) -> None:
    """Checks groups, choices and keys before Hydra does, because Hydra would suggest choices of other packages."""
    groups, schema = group_choices(), schema_keys()
    for o in parsed:
        key, word = o.key_or_group, o.input_line
        written = f"{key}={(word or '').partition('=')[2]}"
        if o.package is not None:
            raise ConfigurationError(
                f"{word}: @{o.package} would move {key} to another package, which is not supported; write {written}"
            )
        if o.type == OverrideType.ADD and (key in groups or key in schema):
            raise ConfigurationError(f"{word}: + adds a key, but {key} already exists; write {written}")
        if key in groups:
            _check_choice(o, key, groups[key])
        elif key.startswith(("env.", "cluster.sbatch.")):
            continue  # these keys depend on the choice of env, and on the options of sbatch
        elif key.startswith("hydra"):
            raise ConfigurationError(f"{word!r}: Hydra's own settings are not supported; {hydra_key_hint(key)}")
        elif o.type == OverrideType.DEL:
            raise ConfigurationError(f"{word!r} deletes a key, but every key of the schema is needed; set a value")
        elif key.startswith(PRETRAINING_PREFIX):
            raise ConfigurationError(
                f"{word} applies only to the pre-training that {EVERY_TASK} starts with if no world_model is given: "
                f"give {EVERY_TASK} and no world_model, or leave {key} out"
            )
        elif key not in schema:
            near = option_hint(key) or nearest_sentence(key, {**schema, **groups})
            raise ConfigurationError(f"{word}: unknown key {key!r}{near}")


def _check_choice(o: Override, group: str, choices: list[str]) -> None:
    if o.type == OverrideType.DEL and group == "experiment":
        return
    if o.type == OverrideType.DEL:
        raise ConfigurationError(
            f"{o.input_line!r} removes a group that every run needs; write {group}=CHOICE, with one of "
            f"{', '.join(choices)}"
        )
    value = o.value()
    if not isinstance(value, str) or value not in choices:
        written = value if isinstance(value, str) else o.input_line.partition("=")[2]
        raise ConfigurationError(
            f"{o.input_line}: {written!r} is not a choice of "
            f"{group}{nearest_sentence(str(written), choices)}\n"
            f"choices of {group}: {', '.join(choices)}"
        )


def _profile(parsed: list[Override]) -> str:
    """The name of the chosen cluster profile; empty if none is chosen."""
    return next((str(o.value()) for o in reversed(parsed) if o.key_or_group == "cluster"), "")


def _profile_words(parsed: list[Override]) -> list[str]:
    """Words that let Hydra find the user's cluster profile and that set its name; empty for a packaged profile.

    Raises:
        ConfigurationError: if a packaged profile has the same name, because Hydra would silently use that one.
    """
    file = user_profiles().get(_profile(parsed))
    if file is None:
        return []
    if (configs_dir() / "cluster" / file.name).exists():
        raise ConfigurationError(
            f"cluster={file.stem} is both {file} and a profile of pwm_torchrl; give the file another name"
        )
    return [f"hydra.searchpath=[{_quoted(f'file://{user_configs_dir()}')}]", f"cluster.name={_quoted(file.stem)}"]


def _check_given(parsed: list[Override], typed: dict[str, Any]) -> None:
    """Checks that the words set all keys that the user's files leave open: merging would use other values for them."""
    for key, file in missing_profile_keys(_profile(parsed)).items():
        if not any(each == key or each.startswith(f"{key}.") for each in typed):
            raise ConfigurationError(f"{file}: {key} has no value; write one there, or set {key}=...")


def _of_profile(parsed: list[Override]) -> dict[str, Any]:
    """The keys of the user's cluster profile with their values, which count as set by the command line."""
    return profile_keys(_profile(parsed))


def _env_words(parsed: list[Override]) -> list[str]:
    """The words for Hydra; a user's own ``env._target_`` selects env=custom, which accepts any key."""
    words = [o.input_line or "" for o in parsed]
    # Any option of sbatch may be added.
    words = ["++" + word.lstrip("+") if re.match(r"\+*cluster\.sbatch[.=]", word) else word for word in words]
    chosen = [o.value() for o in parsed if o.key_or_group == "env"]
    if not chosen and any(o.key_or_group == "env._target_" for o in parsed):
        words.insert(0, "env=custom")
        chosen = ["custom"]
    if chosen[-1:] == ["custom"]:
        return ["++" + w if w.startswith("env.") else w for w in words]
    # Every environment has these keys, even if its file does not list them.
    return ["++" + w if w.partition("=")[0] in KEYS_OF_ANY_ENV else w for w in words]


def _compose(words: list[str], parsed: list[Override]) -> DictConfig:
    try:
        return _hydra(words)
    except _COMPOSITION_ERRORS as error:
        env_keys: list[str] = []
        if any(o.key_or_group.startswith("env.") for o in parsed):
            try:
                rest = _hydra([w for w in words if not w.lstrip("+~").startswith("env.")])
                env_keys = [f"env.{k}" for k in rest.env]
            except _COMPOSITION_ERRORS:
                env_keys = []  # the error is not about env's keys
        raise explain(error, words, env_keys) from error


def _hydra(words: list[str]) -> DictConfig:
    return compose_with_hydra(configs_dir(), words, group_choices().keys())


def _to_config(composed: DictConfig) -> Config:
    """Resolves interpolations and converts the configuration to the schema's dataclasses."""
    for key in missing_keys(OmegaConf.to_container(composed, resolve=False)):
        hint = _MISSING_HINTS.get(key)
        raise ConfigurationError(f"{key} has no value; set {key}=..." + (f", {hint}" if hint else ""))
    try:
        config: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error, [], []) from error
    check_types(config)
    return config


def _label_honestly(config: Config, typed: dict[str, Any]) -> None:
    """Renames a model or size that single keys have changed, so that it does not keep the name of the original choice.

    In particular, a flow with K = 1 must never be reported as Flow V2.
    """
    keys = typed.keys()
    dynamics = config.model.dynamics
    if "model.name" not in keys and any(k.startswith("model.dynamics.") for k in keys):
        if dynamics.kind == "flow":
            system = f"{dynamics.solver}_k{dynamics.substeps}"
            config.model.name = _SYSTEMS.get(system, f"flow_{system}")
            if dynamics.parameterization != "residual_endpoint":
                config.model.name += f"_{dynamics.parameterization}"
            if dynamics.imagination_substeps is not None:
                config.model.name += f"_few{dynamics.imagination_substeps}"
        elif "model.dynamics.kind" in keys:
            config.model.name = dynamics.kind.rpartition(".")[2]
    widths = (
        "latent_dim",
        "units",
        "encoder_units",
        "actor_units",
        "critic_units",
        "simnorm_dim",
        "num_critics",
    )
    if "size.name" not in keys and keys & {f"size.{k}" for k in widths}:
        config.size.name += "_custom"
