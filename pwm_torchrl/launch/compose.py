"""From the command line's words to a checked :class:`~pwm_torchrl.config.Config`.

Hydra composes; nothing of its runtime is used, so there are no output folders and no change of
directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pwm_torchrl.config import MISSING, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.explain import explain
from pwm_torchrl.launch.groups import (
    configs_dir,
    group_choices,
    nearest_sentence,
    schema_keys,
    user_configs_dir,
    user_profiles,
)
from pwm_torchrl.launch.modes import apply_mode, check_stored
from pwm_torchrl.launch.validate import validate
from pwm_torchrl.launch.validate_cluster import read_time
from pwm_torchrl.own_code import make_cwd_importable

__all__ = ["compose"]

SCHEMA = "pwm_config_schema"  # TorchRL owns the plain names in the shared ConfigStore

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)

#: Keys whose values are paths: text, whatever Hydra's grammar makes of their blanks, brackets, commas and equal signs.
PATHS = ("run_dir", "runs_dir", "world_model", "data.path", "data.scratch_dir")

_SYSTEMS = {"heun_k2": "flow_v1", "heun_k4": "flow_v2", "euler_k8": "flow_v3"}

_MISSING_HINTS = {
    "env.id": "for example env.id=HalfCheetah-v5",
    "env.domain": "for example env.domain=walker",
    "env.task": "for example env.task=walk",
    "env._target_": "for example env._target_=my_pkg.make_env",
}


def compose(overrides: Sequence[str] = ()) -> Config:
    """Composes and checks a run's configuration.

    Args:
        overrides: words of the command line, ``group=choice`` or ``group.key=value``.

    Returns:
        The resolved configuration as an instance of the schema; ``env`` is a plain dict.

    Raises:
        ConfigurationError: for whatever cannot work, in a few lines: unknown choices and keys
            (with the nearest ones), wrong types, missing values, values out of range.
    """
    make_cwd_importable()
    parsed = [_parse(word) for word in overrides]
    _check_names(parsed)
    words = [*_profile_words(parsed), *_env_words(parsed)]
    resolved = _to_config(_compose(words, parsed))
    _label_honestly(resolved, parsed)
    apply_mode(resolved, parsed)
    read_time(resolved.cluster)
    validate(resolved)
    check_stored(resolved)
    return resolved


def compose_unchecked(overrides: Sequence[str]) -> Config:
    """The configuration of some words without checks of what they mean together, to find out what a sweep is over."""
    make_cwd_importable()
    parsed = [_parse(word) for word in overrides]
    _check_names(parsed)
    return _to_config(_compose([*_profile_words(parsed), *_env_words(parsed)], parsed))


def _parse(word: str) -> Override:
    if word.startswith("-"):
        raise ConfigurationError(
            f"unknown option {word}; the only option is --help, and settings are written key=value"
        )
    key, equal, value = word.partition("=")
    if key == "tasks" and "," in value and value[0] not in "'\"[":
        word = f"{key}={_quoted(value)}"  # a list of names is one set of tasks, not a sweep
    if key in PATHS and value and value[0] not in "'\"" and value != "null":
        word = f"{key}={_quoted(value)}"
    if not equal and not word.startswith("~"):
        raise ConfigurationError(f"{word!r} is not a setting; write key=value, for example model=flow_v2 or seed=1")
    try:
        override: Override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise ConfigurationError(
            f"cannot read {word!r}; write key=value, and quote a value with special characters: \"{key}='...'\""
        ) from error
    if override.is_sweep_override():
        raise ConfigurationError(f"{word!r} asks for several runs, but one command starts one run; give a single {key}")
    return override


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _check_names(parsed: list[Override]) -> None:
    """Groups, choices and keys, before Hydra sees them: its own search would offer other
    packages' choices.
    """
    groups, schema = group_choices(), schema_keys()
    for o in parsed:
        key, word = o.key_or_group, o.input_line
        if key in groups:
            _check_choice(o, key, groups[key])
        elif key.startswith("env."):
            continue  # the environment's own keys depend on the choice of env
        elif o.type == OverrideType.DEL:
            raise ConfigurationError(f"{word!r} deletes a key, but every key of the schema is needed; set a value")
        elif key.startswith("hydra"):
            raise ConfigurationError(f"{word!r}: Hydra's own settings are not used here; run with --help")
        elif key not in schema:
            raise ConfigurationError(f"{word}: unknown key {key!r}{nearest_sentence(key, {**schema, **groups})}")


def _check_choice(o: Override, group: str, choices: list[str]) -> None:
    value = None if o.type == OverrideType.DEL else o.value()
    if group == "experiment" and value is None:
        return
    if not isinstance(value, str) or value not in choices:
        written = value if isinstance(value, str) else o.input_line.partition("=")[2]
        raise ConfigurationError(
            f"{o.input_line}: {written!r} is not a choice of "
            f"{group}{nearest_sentence(str(written), choices)}\n"
            f"choices of {group}: {', '.join(choices)}"
        )


def _profile_words(parsed: list[Override]) -> list[str]:
    """Words that let Hydra find the user's own cluster profile, labelled by its name; none for the packaged ones.

    Raises:
        ConfigurationError: if it has the name of a packaged one: Hydra would silently take that.
    """
    chosen = [o.value() for o in parsed if o.key_or_group == "cluster"]
    file = user_profiles().get(chosen[-1]) if chosen else None
    if file is None:
        return []
    if (configs_dir() / "cluster" / file.name).exists():
        raise ConfigurationError(
            f"cluster={file.stem} is both {file} and a profile of pwm_torchrl; give the file another name"
        )
    return [f"hydra.searchpath=[{_quoted(f'file://{user_configs_dir()}')}]", f"cluster.name={_quoted(file.stem)}"]


def _env_words(parsed: list[Override]) -> list[str]:
    """The words for Hydra; a user's own maker selects env=custom, whose keys are free."""
    words = [o.input_line or "" for o in parsed]
    chosen = [o.value() for o in parsed if o.key_or_group == "env"]
    if not chosen and any(o.key_or_group == "env._target_" for o in parsed):
        words.insert(0, "env=custom")
        chosen = ["custom"]
    if chosen[-1:] == ["custom"]:
        words = ["++" + w if w.startswith("env.") else w for w in words]
    return words


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
    with _own_schema(), initialize_config_dir(config_dir=str(configs_dir()), version_base="1.3"):
        return hydra_compose(config_name="config", overrides=words)


@contextmanager
def _own_schema() -> Iterator[None]:
    """Inside, the ConfigStore holds Hydra's entries and the schema alone.

    Where TorchRL's configurations are loaded, Hydra would take its ``logger/csv`` for the schema of ours.
    """
    store = ConfigStore.instance()
    everything = store.repo
    kept = {name: node for name, node in everything.items() if name in ("hydra", "_dummy_empty_config_.yaml")}
    store.repo = kept
    store.store(SCHEMA, Config)
    try:
        yield
    finally:
        store.repo = everything


def _to_config(composed: DictConfig) -> Config:
    """Resolves interpolations and leaves OmegaConf behind."""
    for key in _missing_keys(OmegaConf.to_container(composed, resolve=False)):
        hint = _MISSING_HINTS.get(key)
        raise ConfigurationError(f"{key} has no value; set {key}=..." + (f", {hint}" if hint else ""))
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        raise explain(error, [], []) from error
    return config


def _missing_keys(tree: Any, prefix: str = "") -> list[str]:
    """Dotted keys without a value (OmegaConf's own search stops at an interpolation that refers
    to one).
    """
    if isinstance(tree, dict):
        return [k for name, value in tree.items() for k in _missing_keys(value, f"{prefix}{name}.")]
    return [prefix[:-1]] if tree == MISSING else []


def _label_honestly(config: Config, parsed: list[Override]) -> None:
    """A model or size changed by single keys does not keep the name of the choice it started from.

    A flow used at K = 1, above all, must never be reported as Flow V2.
    """
    keys = {o.key_or_group for o in parsed}
    dynamics = config.model.dynamics
    if "model.name" not in keys and any(k.startswith("model.dynamics.") for k in keys):
        if dynamics.kind == "flow":
            system = f"{dynamics.solver}_k{dynamics.substeps}"
            config.model.name = _SYSTEMS.get(system, f"flow_{system}")
            if dynamics.parameterization != "residual_endpoint":
                config.model.name += f"_{dynamics.parameterization}"
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
