"""Import of episodes from files and data sets into a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pwm_torchrl.data.episodes.own_files import PREFIX, EpisodeFile, MinariData
from pwm_torchrl.data.episodes.own_files import SUFFIXES as OWN_SUFFIXES
from pwm_torchrl.data.episodes.sources import ChunkFile, Source, find_files
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeStore
from pwm_torchrl.data.episodes.writer import ByteProgress, StoreWriter
from pwm_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = [
    "CHUNK_SUFFIXES",
    "import_chunks",
    "import_episodes",
    "import_sources",
    "open_sources",
]

# Sources from paths and names -----------------------------------------------------------------------------------------


CHUNK_SUFFIXES = (".pt",)


def open_sources(
    given: Sequence[str | Path | Source],
    task: str | None = None,
    *,
    suffixes: Sequence[str] = (*CHUNK_SUFFIXES, *OWN_SUFFIXES),
) -> list[Source]:
    """Open sources in the given order; the files of a folder are sorted by name.

    Args:
        given (sequence of str, Path or Source): folders, files, ``"minari:ID"`` or ``"minari:ID=TASK"``, or open
            sources.
        task (str, optional): task name for episodes without one. Defaults to ``None``.

    Keyword Args:
        suffixes (sequence of str): suffixes of the files to read. Defaults to all supported ones.

    Raises:
        ConfigurationError: if a source does not exist, or two have the same name.
    """
    found: list[Source] = []
    for each in given:
        if not isinstance(each, (str, Path)):
            found.append(each)
            continue
        if str(each).startswith(PREFIX):
            dataset_id, _, own_task = str(each)[len(PREFIX) :].partition("=")
            found.append(MinariData(dataset_id, own_task or task))
            continue
        for path in find_files(Path(each), suffixes):
            # A single folder may be moved between imports, so its name is not part of the sources' names.
            name = path.name if len(given) == 1 else f"{path.parent.name}/{path.name}"
            found.append(ChunkFile(path, name) if path.suffix in CHUNK_SUFFIXES else EpisodeFile(path, task, name))
    names = [source.name for source in found]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ConfigurationError(f"the sources contain {repeated[0]} more than once; give each a unique name")
    return found


# Import of sources into a store ---------------------------------------------------------------------------------------


IMPORTED, LEFT_OUT = "imported", "left out"
#: Small sources are committed together, because each commit waits for the disk.
_COMMIT_BYTES = 64 << 20
_CHECKS = (
    "widths, padding and task indices agree with the task registry",
    "values are finite and actions lie in [-1, 1]",
    "no source has the same content as another",
    "checksums inside .pt files agree",
)


def import_chunks(
    source: str | Path, store: str | Path, tasks: TaskSet, *, keep_good: bool = False, progress: bool = False
) -> EpisodeStore:
    """Import TD-MPC2's chunks, ``*.pt``, into a store.

    Memory use does not depend on the size of a chunk. If an import is killed, running it again continues with the first
    unfinished chunk.

    Args:
        source (str or Path): folder of the chunks, or one chunk.
        store (str or Path): folder of the store; new, or with an unfinished import.
        tasks (TaskSet): the task set of the chunks' indices.

    Keyword Args:
        keep_good (bool): finish the store without the bad chunks. Defaults to ``False``.
        progress (bool): show progress on stderr. Defaults to ``False``.

    Returns:
        EpisodeStore: the finished store.

    Raises:
        ConfigurationError: unless ``keep_good``, if chunks are corrupt, truncated, wrongly labelled or have another
            shape; the message lists each one with its problem. Also if another import is running, or the disk has too
            little space.
        StorageFault: if the disk fills up or fails.
    """
    chunks = open_sources([source], suffixes=CHUNK_SUFFIXES)
    return import_sources(chunks, store, tasks, keep_good=keep_good, progress=progress)


def import_episodes(
    sources: str | Path | Sequence[str | Path | Source],
    store: str | Path,
    tasks: TaskSet,
    *,
    task: str | None = None,
    keep_good: bool = False,
    progress: bool = False,
) -> EpisodeStore:
    """Import a user's own episodes into a store.

    Args:
        sources (str, Path or sequence of them): folders or files of episodes (``*.npz``, ``*.h5``, ``*.hdf5``, laid out
            as described in :mod:`~pwm_torchrl.data.episodes.own_files`, and TD-MPC2's ``*.pt``), ``"minari:ID"`` or
            ``"minari:ID=TASK"``; or open sources, such as :class:`~pwm_torchrl.run.new_episodes.RunReplay`.
        store (str or Path): folder of the store; new, or with an unfinished import.
        tasks (TaskSet): the tasks of the store.

    Keyword Args:
        task (str, optional): task name for episodes without one. Defaults to ``None``.
        keep_good (bool): finish the store without the bad sources. Defaults to ``False``.
        progress (bool): show progress on stderr. Defaults to ``False``.

    Returns:
        EpisodeStore: the finished store.

    Raises:
        ConfigurationError: as for :func:`import_chunks`.
        MissingLibraryError: if a library for reading a source is not installed.
        StorageFault: if the disk fills up or fails.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if task is not None:
        tasks.index(task)
    return import_sources(open_sources(given, task), store, tasks, keep_good=keep_good, progress=progress)


def import_sources(
    sources: Sequence[Source], store: str | Path, tasks: TaskSet, *, keep_good: bool = False, progress: bool = False
) -> EpisodeStore:
    """Import episodes from any sources; for arguments and errors, see :func:`import_chunks`."""
    with StoreWriter(store, tasks) as writer:
        if writer.finished:
            _check_same(writer, sources)
        else:
            with ByteProgress(2 * sum(source.size for source in sources), progress) as shown:
                _Import(writer, shown).run(sources, keep_good)
    return EpisodeStore.open(store)


class _Import:
    """Imports all sources once."""

    def __init__(self, writer: StoreWriter, shown: ByteProgress) -> None:
        self.writer = writer
        self.shown = shown
        self.problems: dict[str, str] = {}
        self.pending: list[dict[str, Any]] = []
        self.pending_bytes = 0
        self.known = {record["name"]: record for record in writer.manifest["sources"]}
        self.digests = {record["sha256"]: record["name"] for record in writer.manifest["sources"]}

    def run(self, sources: Sequence[Source], keep_good: bool) -> None:
        wanted, rows = [], 0
        for source in sources:
            record = self.known.get(source.name)
            if record is not None:
                self._check_unchanged(source, record)
                self.shown.advance(2 * source.size)
                continue
            try:
                rows += source.check(self.writer.tasks)
                wanted.append(source)
            except BadEpisodes as bad:
                self._leave_out(source, bad)
        self.writer.require_room(rows)
        for source in wanted:
            self._take(source)
        self._commit()
        self._end(sources, keep_good)

    def _take(self, source: Source) -> None:
        mark = self.writer.mark()
        try:
            self.shown.describe(f"{source.name}: checksum")
            digest = source.digest(self.shown.advance)
            if digest in self.digests:
                raise BadEpisodes(f"has the same content as {self.digests[digest]}, which has been imported")
            self.shown.describe(source.name)
            counts = self._copy(source)
        except BadEpisodes as bad:
            self.writer.roll_back(mark)
            self._leave_out(source, bad)
            return
        self.digests[digest] = source.name
        self.pending.append({"name": source.name, "bytes": source.size, "sha256": digest, "state": IMPORTED, **counts})
        self.pending_bytes += source.size
        if self.pending_bytes >= _COMMIT_BYTES:
            self._commit()

    def _copy(self, source: Source) -> dict[str, int]:
        episodes = transitions = shown = 0
        for rows in source.blocks(self.writer.tasks):
            self.writer.append(rows)
            episodes += len(rows.length)
            transitions += int(rows.length.sum())
            step = min(source.size - shown, rows.observation.nbytes + rows.action.nbytes + 2 * rows.reward.nbytes)
            self.shown.advance(step)
            shown += step
        if not episodes:
            raise BadEpisodes("contains no episode")
        self.shown.advance(source.size - shown)
        return {"episodes": episodes, "transitions": transitions}

    def _commit(self) -> None:
        if self.pending:
            self.writer.commit(self.pending)
            self.pending, self.pending_bytes = [], 0

    def _leave_out(self, source: Source, bad: BadEpisodes) -> None:
        self.problems[source.name] = str(bad)
        self.shown.say(f"{source.name}: {bad}")

    def _check_unchanged(self, source: Source, record: dict[str, Any]) -> None:
        if record["bytes"] != source.size:
            raise ConfigurationError(
                f"{source.name} has {source.size:,} bytes, but had {record['bytes']:,} when it was imported into "
                f"the unfinished episode store {self.writer.path}; delete the store and import again"
            )

    def _end(self, sources: Sequence[Source], keep_good: bool) -> None:
        """Finish the store, or raise an error that lists all problems."""
        good = len(self.writer.manifest["sources"])
        listed = "; ".join(f"{name}: {problem}" for name, problem in self.problems.items())
        if self.problems and not (keep_good and good):
            rest = (
                f"the {good} valid ones are kept: repair or remove the others and run the same import again, or use "
                "--keep-good to leave them out"
                if good
                else "none is valid"
            )
            raise ConfigurationError(
                f"{len(self.problems)} of {len(sources)} sources cannot be imported into {self.writer.path} ({rest}): "
                f"{listed}"
            )
        sizes = {source.name: source.size for source in sources}
        left_out = [
            {"name": name, "bytes": sizes[name], "state": LEFT_OUT, "problem": problem}
            for name, problem in self.problems.items()
        ]
        self.writer.finish(sources=[*self.writer.manifest["sources"], *left_out], checks=list(_CHECKS))


def _check_same(writer: StoreWriter, sources: Sequence[Source]) -> None:
    """Refuse to change a finished store, because runs depend on the numbers of its episodes."""
    known = {record["name"]: record["bytes"] for record in writer.manifest["sources"]}
    new = [source.name for source in sources if known.get(source.name) != source.size]
    if new:
        raise ConfigurationError(
            f"the episode store {writer.path} is finished and does not contain {new[0]} as it is now; import into "
            "another folder"
        )
