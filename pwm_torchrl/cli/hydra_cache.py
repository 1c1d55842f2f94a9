"""Composes settings with Hydra, and caches its compositions of config groups.

Hydra takes 0.2 s to combine the files of ``configs/``; setting single keys takes almost no time. Commands that start
many runs compose once for each, mostly from the same files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pwm_torchrl.config import Config

__all__ = ["compose_with_hydra"]

SCHEMA = "pwm_config_schema"  # TorchRL uses the plain names in the shared ConfigStore


def compose_with_hydra(folder: Path, words: Sequence[str], groups: Collection[str]) -> DictConfig:
    """Compose settings and the files of a folder as Hydra does.

    Args:
        folder: the folder with ``config.yaml``.
        words: settings in Hydra's syntax.
        groups: the config groups; only settings that choose from a group decide which files are read.

    Returns:
        A configuration that the caller may change.

    Raises:
        HydraException: if the settings and files do not compose; with Hydra's own message.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
        chooses = [each.key_or_group in groups and not isinstance(each.value(), dict) for each in parsed]
        choices = tuple(word for word, choice in zip(words, chooses, strict=True) if choice)
        settings = [each for each, choice in zip(parsed, chooses, strict=True) if not choice]
        if all(_sets_a_key(each) for each in settings):
            composed = copy.deepcopy(_of_choices(folder, _contents(folder), choices))
            for each in settings:
                added = each.type == OverrideType.FORCE_ADD
                OmegaConf.update(composed, each.key_or_group, each.value(), merge=True, force_add=added)
            return composed
    except (HydraException, OmegaConfBaseException):
        pass  # the call below raises Hydra's own error
    return _of_words(folder, words)


def _sets_a_key(setting: Override) -> bool:
    """Whether it only sets a key's value; a search path, for example, changes which files are found."""
    usual = setting.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD)
    return usual and setting.package is None and not re.match(r"hydra\b|.*/", setting.key_or_group)


def _contents(folder: Path) -> tuple[tuple[str, bytes], ...]:
    """All configuration files of a folder; part of the cache's key, so that edited files are composed anew."""
    return tuple((str(file), file.read_bytes()) for file in sorted(folder.rglob("*.yaml")))


@lru_cache(maxsize=32)
def _of_choices(folder: Path, contents: tuple[tuple[str, bytes], ...], choices: tuple[str, ...]) -> DictConfig:
    return _of_words(folder, choices)


def _of_words(folder: Path, words: Sequence[str]) -> DictConfig:
    with _own_schema(), initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        return hydra_compose(config_name="config", overrides=list(words))


@contextmanager
def _own_schema() -> Iterator[None]:
    """Restrict the ConfigStore to Hydra's entries and the schema for the duration of the block.

    Otherwise, if TorchRL's configurations are loaded, Hydra would use TorchRL's ``logger/csv`` as the schema of ours.
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
