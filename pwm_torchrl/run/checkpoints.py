"""Checkpoints: writing, sealing, reading and pruning them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrl.checkpoint import Checkpoint, CheckpointAdapter
from torchrl.checkpoint._checkpoint import _decode_state_dict_value, _encode_state_dict_value

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import Unneeded, allocate, storage_faults, sync_folder, write_all, write_durably
from pwm_torchrl.run.claims import RunClaim, newest_claim
from pwm_torchrl.run.debugging import failpoint
from pwm_torchrl.terminal import warn

SEAL_FILE = "checksums.json"
MANIFEST = "manifest.json"  # TorchRL's name
_BLOCK = 1 << 22
#: Files flushed at the same time: a journalling file system commits concurrent flushes together, at the cost of one.
_FLUSHES = 8


class BrokenSeal(RuntimeError):
    """A folder's seal file is missing or damaged, or one of its files is missing or has changed."""


def seal(folder: Path) -> None:
    """Flush a folder's files to disk and write their sizes and checksums to its seal file, ``checksums.json``.

    Raises:
        OSError: if a file cannot be flushed or written.
    """
    files = _files(folder)
    with ThreadPoolExecutor(_FLUSHES) as pool:
        checksums = list(pool.map(_flushed, files))
    for inner in {file.parent for file in files}:
        sync_folder(inner)
    listed = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": checksum}
        for file, checksum in zip(files, checksums, strict=True)
    }
    body = json.dumps(listed, sort_keys=True)
    content = {"files": listed, "crc32": zlib.crc32(body.encode())}
    write_durably(folder / SEAL_FILE, json.dumps(content, indent=1) + "\n")


def check_seal(folder: Path) -> None:
    """Compare a folder's files with its seal file.

    Raises:
        BrokenSeal: if there is no seal file or a file differs; the message is a clause about the folder ("it has ...").
    """
    for name, facts in _sealed(folder).items():
        _check_sealed(folder, name, facts)


def check_manifest(folder: Path) -> None:
    """Compare only a checkpoint's manifest with its seal file, which is cheap.

    Raises:
        BrokenSeal: as :func:`check_seal`.
    """
    sealed = _sealed(folder)
    if MANIFEST not in sealed:
        raise BrokenSeal(f"its {SEAL_FILE} does not list {MANIFEST}")
    _check_sealed(folder, MANIFEST, sealed[MANIFEST])


def _sealed(folder: Path) -> dict[str, Any]:
    """Size and checksum of each file at the time when the folder was sealed, by file name."""
    try:
        content = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        listed = content["files"]
        intact = zlib.crc32(json.dumps(listed, sort_keys=True).encode()) == content["crc32"]
    except FileNotFoundError as error:
        raise BrokenSeal(f"it has no {SEAL_FILE}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenSeal(f"its {SEAL_FILE} is damaged") from error
    if not intact:
        raise BrokenSeal(f"its {SEAL_FILE} is damaged")
    return dict(listed)


def _check_sealed(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    file = folder / name
    if not file.is_file():
        raise BrokenSeal(f"its file {name} is missing")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise BrokenSeal(f"its file {name} has {size} of {facts['bytes']} bytes")
    if _checksum(file) != facts["crc32"]:
        raise BrokenSeal(f"its file {name} does not have its checksum")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL_FILE)


def _flushed(file: Path) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _checksum(file)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


STATE_FILE = "state.safetensors"
#: Names of element types in the safetensors format.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StateFileAdapter(CheckpointAdapter):
    """Writes a component's state dict as one file, ``state.safetensors``.

    TorchRL's own adapter writes one file per tensor: hundreds for a small run, which are slow on a cluster's file
    server and count against file quotas. It also copies tensors into memory-mapped files, which causes SIGBUS on a full
    disk. This adapter allocates the space first and writes with ordinary file calls. The file is in the safetensors
    format (https://github.com/huggingface/safetensors); values that are not tensors are JSON in its metadata entry
    ``state``.
    """

    adapter_id = "pwm_torchrl.state_file"

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Write ``component.state_dict(*args, **kwargs)`` into the folder ``path``.

        Raises:
            StorageFault: if the disk is full.
        """
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        schema = _encode_state_dict_value(component.state_dict(*args, **kwargs), tensors)
        write_tensors(path / STATE_FILE, tensors, {"state": json.dumps(schema, separators=(",", ":"))})

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Read the file and pass its state dict to ``component.load_state_dict``."""
        tensors, metadata = map_tensors(path / STATE_FILE)
        state = _decode_state_dict_value(json.loads(metadata["state"]), tensors, map_location)
        component.load_state_dict(state, *args, **kwargs)


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a safetensors file.

    Args:
        file (Path): the file to write; an existing one is replaced.
        tensors (Mapping): tensors by name, on any device and with any layout; copied to the host one at a time.
        metadata (Mapping): strings to store in the file's header.

    Raises:
        StorageFault: if the disk is full; no file is left then.
    """
    # Largest elements first, so that each tensor starts at a multiple of its element size and can be memory-mapped.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with storage_faults(file, "make room for the checkpoint's file", first + end):
        allocate(file, first + end)
        descriptor = os.open(file, os.O_WRONLY)
        try:
            write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
            for name in ordered:
                content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                write_all(descriptor, memoryview(content.numpy().data), first + header[name]["data_offsets"][0])
        finally:
            os.close(descriptor)


def map_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a safetensors file by name, and its metadata; tensors are memory-mapped and read on access.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a safetensors file.
        KeyError: if its header has no metadata, or a tensor of an unknown dtype.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    metadata = header.pop("__metadata__")
    if not any(math.prod(entry["shape"]) for entry in header.values()):
        return {name: torch.empty(e["shape"], dtype=_DTYPES[e["dtype"]]) for name, e in header.items()}, metadata
    content = torch.from_numpy(np.memmap(file, np.uint8, mode="c", offset=8 + size))
    return {
        name: content[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }, metadata


#: Incremented when the set of components, their meaning or their files change.
SCHEMA_VERSION = 4
#: Names of networks in checkpoints of earlier versions; the networks can be loaded, but the runs cannot be resumed.
EARLIER_NETWORKS = {2: {"model": "world_model", "critic": "critics"}}
#: Components added in version 4. Version 3 is otherwise the same, except that each tensor has a file of its own.
SINCE_4 = {"data"}
READABLE = (*EARLIER_NETWORKS, 3, SCHEMA_VERSION)
#: Exceptions that TorchRL raises for a damaged manifest.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
#: Substrings of PyTorch and TorchRL error messages for a checkpoint with other shapes or components.
MISMATCH_MESSAGES = (
    "size mismatch",
    "Missing key",
    "Unexpected key",
    "doesn't match the size",
    "missing=[",
    "unexpected=[",
)


class CheckpointFault(RuntimeError):
    """A checkpoint that cannot be read."""


def kept_replay_steps(store: CheckpointStore) -> int | None:
    """Time steps in replay at the oldest checkpoint that resuming may fall back to; ``None`` without checkpoints.

    The best checkpoint does not count: it may be much older, and it is kept for its policy, not for its replay.
    """
    newest = store.newest_kept()
    steps = [checkpoint_metadata(path).get("replay_steps") for path in newest]
    return min((each for each in steps if each is not None), default=None)


def load_checkpoint(path: Path, components: dict[str, Any]) -> dict[str, Any]:
    """Restore components from a checkpoint directory.

    Args:
        path (Path): the checkpoint.
        components (dict): objects to restore, by component name.

    Returns:
        dict: the checkpoint's metadata.

    Raises:
        CheckpointFault: if it is incomplete, damaged, or of a schema version that lacks one of the components.
        ConfigurationError: if its tensors do not fit the objects.
        StorageFault: if the replay on disk that it refers to is missing.
    """
    metadata = checkpoint_metadata(path)
    version = metadata["schema_version"]
    if version in EARLIER_NETWORKS:
        beside = sorted(components.keys() - {"model", "actor", "critic"})
        if beside:
            raise CheckpointFault(
                f"The checkpoint {path} has schema version {version}, from which this release of pwm_torchrl can load "
                "the networks and evaluate, but not resume; begin a new run."
            )
        components = {EARLIER_NETWORKS[version].get(name, name): each for name, each in components.items()}
    checkpoint = Checkpoint()
    if version == SCHEMA_VERSION:
        checkpoint.register_adapter(object, StateFileAdapter())
    else:
        components = {name: each for name, each in components.items() if name not in SINCE_4}
    for name, component in components.items():
        checkpoint.register(name, component)
    try:
        check_seal(path)
        checkpoint.load(path, map_location="cpu")
    except BrokenSeal as error:
        raise CheckpointFault(f"The checkpoint {path} cannot be read, it is truncated or damaged: {error}.") from error
    except Exception as error:
        if is_out_of_memory(error):  # not the checkpoint's fault
            raise
        link: BaseException | None = error
        while link is not None:  # TorchRL wraps the exceptions of components
            if isinstance(link, ConfigurationError):
                raise link from error
            if isinstance(link, StorageFault):
                raise StorageFault(f"The checkpoint {path} cannot be resumed: {link}") from error
            link = link.__cause__
        text = " ".join(str(error).split())
        if any(sign in text for sign in MISMATCH_MESSAGES):
            raise ConfigurationError(f"The checkpoint {path} belongs to another configuration: {text[:300]}") from error
        raise CheckpointFault(
            f"The checkpoint {path} cannot be read, it is truncated or damaged ({type(error).__name__}: {text[:200]})."
        ) from error
    return metadata


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's metadata.

    Raises:
        CheckpointFault: if it is not a readable checkpoint or has an unsupported schema version.
    """
    try:
        metadata = dict(Checkpoint.manifest(path).get("metadata", {}))
    except _UNREADABLE as error:
        raise CheckpointFault(f"{path} is not a readable checkpoint ({' '.join(str(error).split())[:200]}).") from error
    version = metadata.get("schema_version")
    if version not in READABLE:
        raise CheckpointFault(
            f"The checkpoint {path} has schema version {json.dumps(version)}; this release of pwm_torchrl reads "
            f"version {SCHEMA_VERSION}."
        )
    return metadata


FOLDER = "checkpoints"
METRIC = "eval_return"
_INSIDE = "inside"
#: Names that select a checkpoint; ``latest`` is an older name for ``last``.
WHICH = ("best", "last", "latest")


@dataclass(frozen=True, order=True)
class SavedCheckpoint:
    """A saved checkpoint, ordered by attempt, completed epochs, and whether it was saved inside the next epoch."""

    attempt: int
    epoch: int
    inside: bool
    path: Path

    @property
    def metric(self) -> float | None:
        """Evaluation return of its policy; ``None`` if its manifest cannot be read or does not match its seal."""
        try:
            check_manifest(self.path)
            value = Checkpoint.manifest(self.path).get("metadata", {}).get(METRIC)
            return None if value is None else float(value)
        except _UNREADABLE:
            return None


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        run_dir (Path): the run's directory.
        keep_last (int): number of newest checkpoints to keep, beside the best by evaluation return. Defaults to ``2``.
        claim (RunClaim, optional): claim of the attempt that saves; without one, checkpoints can only be read. Defaults
            to ``None``.
    """

    def __init__(self, run_dir: Path, keep_last: int = 2, claim: RunClaim | None = None) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / FOLDER
        self.keep_last = keep_last
        self.claim = claim
        self._abandoned: set[Path] = set()
        self._unneeded = Unneeded(warn)

    def save(self, checkpoint: Checkpoint, epoch: int, metadata: Mapping[str, Any], *, inside: bool = False) -> Path:
        """Save a checkpoint, then delete those that need not be kept.

        Raises:
            Superseded: if another attempt has taken over the run; nothing is saved then.
        """
        assert self.claim is not None, "only the attempt that owns a run saves"
        self.claim.check()
        folder = self.directory / f"attempt-{self.claim.attempt:04d}"
        name = f"checkpoint-{epoch:06d}" + (f"-{_INSIDE}" if inside else "")
        target, draft = folder / name, folder / f".{name}.partial"
        for each in (self.directory, folder):  # not their parents: a deleted run directory must not be created again
            each.mkdir(exist_ok=True)
        self._remove(draft)
        failpoint("save.begin")
        try:
            checkpoint.save(draft, metadata=dict(metadata))
            failpoint("save.written")
            seal(draft)
            failpoint("save.sealed")
            self.claim.check()
        except BaseException:
            self._remove(draft)
            if self.claim.gone:
                _remove_empty(folder, self.directory, self.run_dir)  # created again by writing the draft
            raise
        if target.exists():  # an epoch may be saved again, with its evaluation or at the end
            self._remove(target)
        os.replace(draft, target)
        failpoint("save.renamed")
        sync_folder(folder)
        sync_folder(self.directory)
        self.prune()
        failpoint("save.pruned")
        return target

    def resume_candidates(self) -> list[SavedCheckpoint]:
        """Checkpoints that the run may resume from, oldest first, including damaged ones.

        These are the checkpoints of the newest attempt, and those that existed when it claimed the run.
        """
        everything = self._everything()
        newest = newest_claim(self.run_dir)
        if newest is None or newest.adopted is None:
            return everything
        adopted = {self.run_dir / name for name in newest.adopted} - self._abandoned
        return [each for each in everything if each.attempt >= newest.attempt or each.path in adopted]

    def abandon_after(self, restored: Path) -> None:
        """Exclude the checkpoints after ``restored`` from now on, because they could not be read."""
        paths = self.paths()
        self._abandoned.update(paths[paths.index(restored) + 1 :])

    def names(self) -> list[str]:
        """Paths of the :meth:`resume_candidates`, relative to the run directory."""
        return [each.path.relative_to(self.run_dir).as_posix() for each in self.resume_candidates()]

    def paths(self) -> list[Path]:
        """Paths of the :meth:`resume_candidates`, oldest first."""
        return [each.path for each in self.resume_candidates()]

    def latest(self) -> Path | None:
        """The newest of the :meth:`resume_candidates` with a readable manifest."""
        readable = self._readable()
        return readable[-1][0].path if readable else None

    def best(self) -> Path | None:
        """The checkpoint with the highest evaluation return (the newest of equals), saved after a whole epoch."""
        rated = [(metric, saved) for saved, metric in self._readable() if not saved.inside]
        return max(rated)[1].path if rated else None

    def pick(self, which: str | int) -> Path:
        """The checkpoint that a user selects.

        Args:
            which (str or int): ``"best"`` by evaluation return, ``"last"`` (or ``"latest"``), or a number of epochs.

        Raises:
            ConfigurationError: if the name is unknown, or there is no such checkpoint; the message lists those that
                exist.
        """
        word = str(which)
        if word not in WHICH and not word.isdecimal():
            raise ConfigurationError(
                f"which={which!r} is not one of {', '.join(WHICH)}, nor the number of an epoch that has a checkpoint."
            )
        self._tell_unreadable()
        latest, best = self.latest(), self.best()
        if latest is None:
            raise ConfigurationError(f"{self.run_dir} has no checkpoint yet.")
        if word in WHICH:
            return (best if word == "best" else None) or latest
        there = [saved for saved, _ in self._readable()]
        found = [saved for saved in there if saved.epoch == int(word)]
        if not found:
            names = {path: name for name, path in (("best", best), ("last", latest)) if path is not None}
            if best == latest:
                names = {latest: "best and last"}
            epochs: dict[int, str] = {}
            for saved in there:
                named = f" ({names[saved.path]})" if saved.path in names else ""
                epochs[saved.epoch] = epochs.get(saved.epoch, "") + named
            listed = ", ".join(f"{epoch}{named}" for epoch, named in sorted(epochs.items()))
            raise ConfigurationError(f"{self.run_dir} has no checkpoint of epoch {word}; choose one of {listed}.")
        return max(found, key=lambda saved: (saved.attempt, not saved.inside)).path

    def _tell_unreadable(self) -> None:
        """Warn of the checkpoints that cannot be read and so cannot be selected."""
        readable = {saved.path for saved, _ in self._readable()}
        for each in self.resume_candidates():
            if each.path not in readable:
                warn(f"the checkpoint {each.path} cannot be read; it is ignored")

    def newest_kept(self) -> list[Path]:
        """The newest readable checkpoints, which resuming may fall back to; the best one may be much older."""
        return [saved.path for saved, _ in self._readable()[-self.keep_last :]]

    def prune(self) -> None:
        """Delete all checkpoints but the newest and the best, and the drafts of attempts that were killed in a save."""
        assert self.claim is not None, "only the attempt that owns a run deletes"
        kept = {*self.newest_kept(), self.best()}
        for each in self._everything():
            if each.path not in kept and each.attempt <= self.claim.attempt:
                self._remove(each.path)
        for leftover in self.directory.glob("attempt-*/.*"):
            self._unneeded.delete(leftover, shutil.rmtree)
        _remove_empty(*self.directory.glob("attempt-*"))

    def _remove(self, path: Path) -> None:
        """Rename a folder, then delete it, so that a partly deleted folder never has the original name."""
        if not path.exists():
            return
        gone = path.with_name(f".{path.name.strip('.')}.{uuid.uuid4().hex[:8]}.deleted")
        os.replace(path, gone)
        failpoint("save.deleting")
        self._unneeded.delete(gone, shutil.rmtree)

    def _readable(self) -> list[tuple[SavedCheckpoint, float]]:
        rated = ((each, each.metric) for each in self.resume_candidates())
        return [(saved, metric) for saved, metric in rated if metric is not None]

    def _everything(self) -> list[SavedCheckpoint]:
        found = []
        for path in self.directory.glob("attempt-*/checkpoint-*"):
            attempt = path.parent.name.rpartition("-")[2]
            epoch, _, suffix = path.name.removeprefix("checkpoint-").partition("-")
            if attempt.isdigit() and epoch.isdigit() and suffix in ("", _INSIDE):
                found.append(SavedCheckpoint(int(attempt), int(epoch), suffix == _INSIDE, path))
        return sorted(found)


def _remove_empty(*folders: Path) -> None:
    """Delete the folders that are empty, in the given order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
