"""Checkpoints of a run: what they hold, where they lie, and how they are read.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` directory: published by one rename, readable without
unpickling. Its metadata hold :data:`SCHEMA_VERSION`, the epoch and the evaluation return by which the best is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint, CheckpointRotation

from pwm_torchrl.errors import ConfigurationError

#: Raised when the set of components or their meaning changes.
SCHEMA_VERSION = 1
METRIC = "eval_return"
FOLDER = "checkpoints"


class CheckpointFault(RuntimeError):
    """A checkpoint that cannot be read."""


def rotation(run_dir: Path, keep_last: int = 2) -> CheckpointRotation:
    """The run's checkpoints: the newest ones and the best by evaluation return."""
    return CheckpointRotation(run_dir / FOLDER, keep_last=keep_last, keep_best=(METRIC, "max"))


def load_checkpoint(path: Path, components: dict[str, Any]) -> dict[str, Any]:
    """Restore components from a checkpoint directory.

    Args:
        path (Path): the checkpoint.
        components (dict): live objects by component name.

    Returns:
        dict: its metadata.

    Raises:
        CheckpointFault: if it is incomplete, damaged or of another schema version.
        ConfigurationError: if its tensors do not fit the live objects.
    """
    metadata = checkpoint_metadata(path)
    try:
        Checkpoint(**components).load(path, components=list(components))
    except ConfigurationError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if "size mismatch" in text or "Missing key" in text or "Unexpected key" in text:
            raise ConfigurationError(f"The checkpoint {path} belongs to another configuration: {text[:300]}") from error
        raise CheckpointFault(
            f"The checkpoint {path} cannot be read, it is truncated or damaged ({type(error).__name__}: "
            f"{text[:200]}); delete it to fall back on the one before."
        ) from error
    return metadata


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's metadata.

    Raises:
        CheckpointFault: if it is no checkpoint or of another schema version.
    """
    try:
        metadata = dict(Checkpoint.manifest(path).get("metadata", {}))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointFault(f"{path} is not a readable checkpoint ({' '.join(str(error).split())[:200]}).") from error
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointFault(
            f"The checkpoint {path} has schema version {json.dumps(version)}; this release of pwm_torchrl reads "
            f"version {SCHEMA_VERSION}."
        )
    return metadata
