"""What the words of a command line or a script mean as sources of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.data.episodes.chunks import ChunkFile
from pwm_torchrl.data.episodes.minari_data import PREFIX, MinariData
from pwm_torchrl.data.episodes.own_files import SUFFIXES as OWN_SUFFIXES
from pwm_torchrl.data.episodes.own_files import EpisodeFile
from pwm_torchrl.data.episodes.sources import Source, find_files
from pwm_torchrl.errors import ConfigurationError

__all__ = ["CHUNK_SUFFIXES", "open_sources"]

CHUNK_SUFFIXES = (".pt",)


def open_sources(
    given: Sequence[str | Path], task: str | None = None, *, suffixes: Sequence[str] = (*CHUNK_SUFFIXES, *OWN_SUFFIXES)
) -> list[Source]:
    """Sources in the order given, files of a folder in the order of their names.

    Args:
        given (sequence of str or Path): folders, files, ``"minari:ID"`` or ``"minari:ID=TASK"``.
        task (str, optional): name of the task of episodes that name none. Defaults to ``None``.

    Keyword Args:
        suffixes (sequence of str): of the files to read. Defaults to all that can be read.

    Raises:
        ConfigurationError: if one is not there, or two have the same name.
    """
    found: list[Source] = []
    for each in given:
        if str(each).startswith(PREFIX):
            dataset_id, _, own_task = str(each)[len(PREFIX) :].partition("=")
            found.append(MinariData(dataset_id, own_task or task))
            continue
        for path in find_files(Path(each), suffixes):
            # One folder's files are known by their names wherever it lies; of several, the folder tells them apart.
            name = path.name if len(given) == 1 else f"{path.parent.name}/{path.name}"
            found.append(ChunkFile(path, name) if path.suffix in CHUNK_SUFFIXES else EpisodeFile(path, task, name))
    names = [source.name for source in found]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ConfigurationError(f"the sources have {repeated[0]} more than once; give each another name")
    return found
