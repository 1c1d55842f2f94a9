"""Checkpoints of a run: what they hold, where they lie, and how they are read.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` directory: published by one rename, readable without
unpickling. Its metadata hold :data:`SCHEMA_VERSION`, the epoch and the evaluation return by which the best is kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation

from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.training.recovery import is_out_of_memory

#: Raised when the set of components or their meaning changes.
SCHEMA_VERSION = 1
METRIC = "eval_return"
FOLDER = "checkpoints"
#: Parts of the messages of PyTorch and TorchRL that tell a checkpoint of other shapes or components.
MISFITS = ("size mismatch", "Missing key", "Unexpected key", "doesn't match the size", "missing=[", "unexpected=[")


class CheckpointFault(RuntimeError):
    """A checkpoint that cannot be read."""


def rotation(run_dir: Path, keep_last: int = 2) -> CheckpointRotation:
    """The run's checkpoints: the newest ones and the best by evaluation return."""
    return CheckpointRotation(run_dir / FOLDER, keep_last=keep_last, keep_best=(METRIC, "max"))


def kept_replay_steps(kept: CheckpointRotation) -> int | None:
    """Time steps in replay at the oldest checkpoint that resuming may fall back to; ``None`` without checkpoints.

    The best checkpoint may be much older than the newest ones; it is kept for its policy, not for its replay.
    """
    newest = kept.checkpoints()[-kept.keep_last :]
    steps = [Checkpoint.manifest(path).get("metadata", {}).get("replay_steps") for path in newest]
    return min((each for each in steps if each is not None), default=None)


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Every checkpoint of a run, oldest first, damaged ones included: TorchRL's rotation passes over those."""
    return sorted(path for path in (run_dir / FOLDER).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())


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
        StorageFault: if the replay on disk that it refers to is not there.
    """
    metadata = checkpoint_metadata(path)
    try:
        check_tensor_files(path)
        Checkpoint(**components).load(path, components=list(components), map_location="cpu")
    except Exception as error:
        if is_out_of_memory(error):  # that says nothing about the checkpoint
            raise
        link: BaseException | None = error
        while link is not None:  # TorchRL wraps what a component raises
            if isinstance(link, ConfigurationError):
                raise link from error
            if isinstance(link, StorageFault):
                raise StorageFault(f"The checkpoint {path} cannot be resumed: {link}") from error
            link = link.__cause__
        text = " ".join(str(error).split())
        if any(sign in text for sign in MISFITS):
            raise ConfigurationError(f"The checkpoint {path} belongs to another configuration: {text[:300]}") from error
        raise CheckpointFault(
            f"The checkpoint {path} cannot be read, it is truncated or damaged ({type(error).__name__}: {text[:200]})."
        ) from error
    return metadata


def check_tensor_files(path: Path) -> None:
    """Compare the files of tensors with the shapes that lie beside them.

    Memory-mapping fills a file that is too short with zeros, without a word.

    Raises:
        CheckpointFault: if a file is missing or of another size.
    """
    for described in sorted(path.glob("components/*/**/meta.json")):
        for name, entry in json.loads(described.read_text(encoding="utf-8")).items():
            if not (isinstance(entry, dict) and "dtype" in entry and "shape" in entry):
                continue
            dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
            expected = math.prod(entry["shape"]) * dtype.itemsize
            file = described.with_name(f"{name}.memmap")
            if expected and (not file.is_file() or file.stat().st_size != expected):
                raise CheckpointFault(f"{file.relative_to(path)} does not have its {expected} bytes")


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
