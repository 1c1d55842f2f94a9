"""``config.yaml`` of a run directory."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pwm_torchrl.config import RENAMED_KEYS, Config
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

CONFIG_FILE = "config.yaml"


def save_config(config: Config, run_dir: Path) -> None:
    """Write ``config.yaml``, unless it says the same already; the directory's own path is left out, so that a run can
    be moved.
    """
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(asdict(replace(config, run_dir=None))))
    target, partial = run_dir / CONFIG_FILE, run_dir / (CONFIG_FILE + ".tmp")
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)


def load_config(run_dir: str | Path) -> Config:
    """Read the ``config.yaml`` of a run back into the schema.

    Raises:
        ConfigurationError: if there is none, or it does not fit the schema.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise MissingLibraryError(
            "Reading a run's config.yaml needs OmegaConf: pip install 'pwm-torchrl[launch]'."
        ) from error
    file = Path(run_dir) / CONFIG_FILE
    if not file.is_file():
        raise ConfigurationError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    try:
        content = OmegaConf.load(file)
        rename_keys(content)
        stored: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigurationError(f"{file} does not fit this version at {key}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise ConfigurationError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from error
    return stored


def rename_keys(content: Any) -> None:
    """Give the keys of a file that an earlier version wrote their present names, in place.

    Args:
        content (DictConfig): the file.
    """
    from omegaconf import OmegaConf

    for old, new in RENAMED_KEYS.items():
        section, _, leaf = old.rpartition(".")
        holder = OmegaConf.select(content, section)
        if holder is None or leaf not in holder:
            continue
        for key in new:
            OmegaConf.update(content, key, holder[leaf], force_add=True)
        del holder[leaf]
