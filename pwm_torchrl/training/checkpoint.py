"""What a checkpoint holds and how it is read; where checkpoints lie is :mod:`~pwm_torchrl.training.checkpoint_store`'s.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` directory, readable without unpickling. Its metadata
hold :data:`SCHEMA_VERSION`, the epoch and the evaluation return by which the best is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.seal import BrokenSeal, check_seal

#: Raised when the set of components or their meaning changes.
SCHEMA_VERSION = 3
#: Names of networks in checkpoints of earlier versions, whose networks can be read and whose runs cannot be resumed.
EARLIER_NETWORKS = {2: {"model": "world_model", "critic": "critics"}}
#: Parts of the messages of PyTorch and TorchRL that tell a checkpoint of other shapes or components.
MISFITS = ("size mismatch", "Missing key", "Unexpected key", "doesn't match the size", "missing=[", "unexpected=[")


class CheckpointFault(RuntimeError):
    """A checkpoint that cannot be read."""


def kept_replay_steps(store: CheckpointStore) -> int | None:
    """Time steps in replay at the oldest checkpoint that resuming may fall back to; ``None`` without checkpoints.

    The best checkpoint may be much older than the newest ones; it is kept for its policy, not for its replay.
    """
    newest = store.newest_kept()
    steps = [Checkpoint.manifest(path).get("metadata", {}).get("replay_steps") for path in newest]
    return min((each for each in steps if each is not None), default=None)


def load_checkpoint(path: Path, components: dict[str, Any]) -> dict[str, Any]:
    """Restore components from a checkpoint directory.

    Args:
        path (Path): the checkpoint.
        components (dict): live objects by component name.

    Returns:
        dict: its metadata.

    Raises:
        CheckpointFault: if it is incomplete, damaged, or of a schema version that lacks one of the components.
        ConfigurationError: if its tensors do not fit the live objects.
        StorageFault: if the replay on disk that it refers to is not there.
    """
    metadata = checkpoint_metadata(path)
    version = metadata["schema_version"]
    if version != SCHEMA_VERSION:
        beside = sorted(components.keys() - {"model", "actor", "critic"})
        if beside:
            raise CheckpointFault(
                f"The checkpoint {path} has schema version {version}, from which this release of pwm_torchrl can load "
                "the networks and evaluate, but not resume; begin a new run."
            )
        components = {EARLIER_NETWORKS[version].get(name, name): each for name, each in components.items()}
    try:
        check_seal(path)
        Checkpoint(**components).load(path, components=list(components), map_location="cpu")
    except BrokenSeal as error:
        raise CheckpointFault(f"The checkpoint {path} cannot be read, it is truncated or damaged: {error}.") from error
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
    if version != SCHEMA_VERSION and version not in EARLIER_NETWORKS:
        raise CheckpointFault(
            f"The checkpoint {path} has schema version {json.dumps(version)}; this release of pwm_torchrl reads "
            f"version {SCHEMA_VERSION}."
        )
    return metadata
