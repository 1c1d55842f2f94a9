"""What a store of episodes takes, without opening it."""

from __future__ import annotations

from pathlib import Path

from pwm_torchrl.errors import ConfigurationError

EPISODES_FILE = "episodes.npy"
#: Copies of the table of episodes: as read, its columns, and the sums by which starts are drawn.
TABLE_COPIES = 4


def store_bytes(path: str | Path) -> tuple[int, int]:
    """Bytes of a store's files, which the page cache may hold, and of its index in RAM.

    Raises:
        ConfigurationError: if there is no store.
    """
    folder = Path(path).expanduser()
    table = folder / EPISODES_FILE
    if not table.is_file():
        raise ConfigurationError(f"data.path={path} holds no episodes: there is no {EPISODES_FILE}")
    files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return files, TABLE_COPIES * table.stat().st_size
