"""A run's directory: created, recognised, resumed or refused."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.config_file import CONFIG_FILE, load_config, save_config
from pwm_torchrl.training.summary_file import read_summary, set_status, was_started

__all__ = [
    "RunDir",
    "differing_keys",
    "load_config",
    "prepare_run_dir",
    "read_summary",
    "save_config",
    "set_status",
    "settings_of",
    "was_started",
]

# Keys that do not change what a run learns: where it runs and logs, what it shows, how often it
# saves. The split of a batch changes the rounding only, and a run must be able to come back with a
# smaller one.
IGNORED = (
    "run_dir",
    "runs_dir",
    "pretraining",
    "cluster",
    "logger",
    "memory",
    "training.steps",  # training.epochs holds what it comes to
    "training.progress",
    "training.video",
    "training.threads",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.replay_storage",
    "training.check_graphs",
    "model.dynamics.checkpoint_substeps",
)


class RunDir(NamedTuple):
    """Where a run lives, and whether it continues an earlier attempt."""

    path: Path
    resume: bool


def prepare_run_dir(config: Config) -> RunDir:
    """Creates or recognises the directory of a run and saves the configuration in it.

    Without ``config.run_dir`` a new one is created under ``config.runs_dir``. With it: an empty or
    missing directory is a fresh start, an unfinished run of the same configuration is resumed,
    everything else is refused.

    Raises:
        ConfigurationError: if the directory cannot be written, holds something else, a run of
            another configuration (the differing keys are listed) or a finished run.
    """
    if config.run_dir is None:
        path = _new_directory(config)
    else:
        path = Path(config.run_dir).expanduser().absolute()
        _examine(path, config)
    _require_writable(path, "run_dir" if config.run_dir is not None else "runs_dir")
    save_config(config, path)
    return RunDir(path, was_started(path))


def differing_keys(stored: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two configurations differ in a way that matters, with both values."""
    a, b = settings_of(stored), settings_of(asked)
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def settings_of(config: Config) -> dict[str, Any]:
    """Dotted keys that change what a run learns, with their values."""
    flat = _flat(dataclasses.asdict(config))
    return {k: v for k, v in flat.items() if not any(k == i or k.startswith(i + ".") for i in IGNORED)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def _examine(path: Path, config: Config) -> None:
    """Raises unless ``path`` is free or holds an unfinished run of this configuration."""
    try:
        empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise ConfigurationError(f"run_dir={path} cannot be read: {error.strerror}") from error
    if empty:
        return
    if not path.is_dir():
        raise ConfigurationError(f"run_dir={path} is a file; give a directory")
    if not (path / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"run_dir={path} is neither empty nor a run directory (it has no {CONFIG_FILE}); give another run_dir"
        )
    if read_summary(path).get("status") == "finished":
        raise ConfigurationError(f"run_dir={path} holds a finished run; give another run_dir, or none for a new one")
    differing = differing_keys(load_config(path), config)
    if differing:
        lines = [f"  {key}: {old} there, {new} asked for" for key, (old, new) in differing.items()]
        raise ConfigurationError(
            f"run_dir={path} holds a run of another configuration; give another run_dir, or the "
            "same settings:\n" + "\n".join(lines)
        )


def _new_directory(config: Config) -> Path:
    env = config.env.get("name") or config.env["_target_"]
    label = f"{env}_{config.model.name}_{config.size.name}_s{config.seed}"
    name = f"{label}_{time.strftime('%Y%m%d-%H%M%S')}"
    name = re.sub(r"[^\w.-]+", "-", name)
    runs = Path(config.runs_dir).expanduser().absolute()
    attempt = 1
    while True:
        path = runs / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if not path.is_dir():
                raise ConfigurationError(f"runs_dir={config.runs_dir} is not a directory") from error
            attempt += 1
        except OSError as error:
            raise ConfigurationError(f"runs_dir={config.runs_dir} cannot be written: {error.strerror}") from error


def _require_writable(path: Path, key: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigurationError(f"{key}={path} cannot be written: {error.strerror}") from error
