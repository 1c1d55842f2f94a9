"""Offline episodes of many tasks in memory-mapped files: importing, sampling, inspecting, staging.

May import the task registry (``envs.tasks``) beside what ``data`` may. Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_torchrl.data.episodes.importing import import_chunks, import_episodes, import_sources
    from pwm_torchrl.data.episodes.index import SliceIndex, split_episodes
    from pwm_torchrl.data.episodes.store import EpisodeStore
    from pwm_torchrl.data.episodes.writer import EpisodeRows, StoreWriter

__all__ = [
    "EpisodeRows",
    "EpisodeStore",
    "SliceIndex",
    "StoreWriter",
    "import_chunks",
    "import_episodes",
    "import_sources",
    "split_episodes",
]

_HOME = {
    "EpisodeRows": "writer",
    "EpisodeStore": "store",
    "SliceIndex": "index",
    "StoreWriter": "writer",
    "import_chunks": "importing",
    "import_episodes": "importing",
    "import_sources": "importing",
    "split_episodes": "index",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
