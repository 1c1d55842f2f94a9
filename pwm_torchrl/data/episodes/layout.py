"""Files of an episode store, and its manifest.

A store is a folder of flat little-endian arrays with one row per *observation*. An episode of L transitions has L + 1
rows, one after the other; the action and the reward of row t belong to the transition from row t − 1 to row t, so that
both are filler (0) in an episode's first row.

- ``observation.f32``: float32 ``[rows, O]``, padded with zeros to the widest task.
- ``action.f32``: float32 ``[rows, A]`` in [−1, 1], padded with zeros to the widest task.
- ``reward.f32``: float32 ``[rows]``.
- ``terminated.u8``, optional: uint8 ``[rows]``, 1 in the last row of an episode that ended by termination.
- ``episodes.npy``: int64 ``[E, 3]``: first row, transitions L, index of the task.
- ``returns.npy``: float64 ``[E]``, undiscounted returns.
- ``manifest.json``: what is in it, of which source files, and whether it is finished.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError

FORMAT = "pwm_torchrl.episodes"
VERSION = 1
IMPORTING, FINISHED = "importing", "finished"

OBSERVATION, ACTION, REWARD, TERMINATED = "observation.f32", "action.f32", "reward.f32", "terminated.u8"
EPISODES, RETURNS, MANIFEST = "episodes.npy", "returns.npy", "manifest.json"


def bytes_per_row(observation_dim: int, action_dim: int) -> dict[str, int]:
    """Bytes of a row in each file."""
    return {OBSERVATION: 4 * observation_dim, ACTION: 4 * action_dim, REWARD: 4, TERMINATED: 1}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, finished or not.

    Raises:
        ConfigurationError: if the folder is no store, or one of a newer version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"it has no {MANIFEST}" if path.is_dir() else "there is no such folder"
        raise ConfigurationError(
            f"{path} is not an episode store: {what}; make one with '{typed('data')} import SOURCE {path}'"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"the episode store {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not an episode store: its {MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigurationError(f"{path} is not an episode store: its {MANIFEST} does not say format {FORMAT!r}")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise ConfigurationError(
            f"the episode store {path} has version {manifest.get('version')}; this installation reads up to {VERSION}: "
            "update it, or import the data again"
        )
    return manifest


def file_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of each data file that belong to the store."""
    widths = bytes_per_row(manifest["observation_dim"], manifest["action_dim"])
    rows = manifest["transitions"] + manifest["episodes"]
    return {name: rows * width for name, width in widths.items() if name != TERMINATED or manifest["has_terminated"]}
