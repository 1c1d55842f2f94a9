"""Offline episodes of many tasks in memory-mapped files: import, sampling, inspection, copies on local disks.

May import what ``data`` may, and the task registry (``envs.tasks``). Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_torchrl.data.episodes.importing import import_chunks, import_episodes, import_sources
    from pwm_torchrl.data.episodes.index import SliceIndex, split_episodes
    from pwm_torchrl.data.episodes.inspection import Inspection, TaskReport, inspect_source, inspect_store
    from pwm_torchrl.data.episodes.store import EpisodeStore
    from pwm_torchrl.data.episodes.writer import EpisodeRows, StoreWriter, stage_store

__all__ = [
    "EpisodeRows",
    "EpisodeStore",
    "Inspection",
    "SliceIndex",
    "StoreWriter",
    "TaskReport",
    "import_chunks",
    "import_episodes",
    "import_sources",
    "inspect_source",
    "inspect_store",
    "split_episodes",
    "stage_store",
]

_HOME = {
    "EpisodeRows": "store",
    "EpisodeStore": "store",
    "SliceIndex": "index",
    "StoreWriter": "writer",
    "import_chunks": "importing",
    "import_episodes": "importing",
    "import_sources": "importing",
    "Inspection": "inspection",
    "TaskReport": "inspection",
    "inspect_source": "inspection",
    "inspect_store": "inspection",
    "split_episodes": "index",
    "stage_store": "writer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
