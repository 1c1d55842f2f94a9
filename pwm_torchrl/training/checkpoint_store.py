"""Where a run's checkpoints lie, which of them count, and which are kept.

``checkpoints/attempt-0002/checkpoint-000120`` is TorchRL's checkpoint directory of epoch 120, written by the second
attempt, with the sizes and checksums of its files beside them. It is written under another name, flushed to the disk,
sealed with its checksums and renamed last: what has its name is whole, unless the disk damaged it since, which the
checksums tell. ``checkpoint-000120-inside`` was saved in the middle of the epoch after 120.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint

from pwm_torchrl.data.files import sync_folder
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.claims import RunClaim, newest_claim
from pwm_torchrl.training.failpoints import failpoint
from pwm_torchrl.training.seal import seal

FOLDER = "checkpoints"
METRIC = "eval_return"
_INSIDE = "inside"
#: Names of checkpoints; ``latest`` is the older word for ``last``.
WHICH = ("best", "last", "latest")


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint by its place in time: attempt, complete epochs, whether it was saved inside the next one."""

    attempt: int
    epoch: int
    inside: bool
    path: Path

    @property
    def metric(self) -> float | None:
        """Evaluation return of its policy; ``None`` if its manifest cannot be read."""
        try:
            value = Checkpoint.manifest(self.path).get("metadata", {}).get(METRIC)
        except (OSError, ValueError, KeyError, RuntimeError):
            return None
        return None if value is None else float(value)


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        run_dir (Path): the run's directory.
        keep_last (int): newest ones kept, beside the best by evaluation return. Defaults to ``2``.
        claim (RunClaim, optional): of the attempt that saves; without one, checkpoints can only be read. Defaults to
            ``None``.
    """

    def __init__(self, run_dir: Path, keep_last: int = 2, claim: RunClaim | None = None) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / FOLDER
        self.keep_last = keep_last
        self.claim = claim
        self._abandoned: set[Path] = set()

    def save(self, checkpoint: Checkpoint, epoch: int, metadata: Mapping[str, Any], *, inside: bool = False) -> Path:
        """Save, then delete what need not be kept.

        Raises:
            Superseded: if another attempt owns the run by now; nothing is left then.
        """
        assert self.claim is not None, "only the attempt that owns a run saves"
        self.claim.check()
        folder = self.directory / f"attempt-{self.claim.attempt:04d}"
        name = f"checkpoint-{epoch:06d}" + (f"-{_INSIDE}" if inside else "")
        target, draft = folder / name, folder / f".{name}.partial"
        folder.mkdir(parents=True, exist_ok=True)
        _remove(draft)
        failpoint("save.begin")
        try:
            checkpoint.save(draft, metadata=dict(metadata))
            failpoint("save.written")
            seal(draft)
            failpoint("save.sealed")
            self.claim.check()
        except BaseException:
            _remove(draft)
            raise
        if target.exists():  # the epoch was saved before, and again with its evaluation or at the end
            _remove(target)
        os.replace(draft, target)
        failpoint("save.renamed")
        sync_folder(folder)
        sync_folder(self.directory)
        self.prune()
        failpoint("save.pruned")
        return target

    def countable(self) -> list[Saved]:
        """Checkpoints that the run may continue from, oldest first, whole or damaged.

        They are those of the newest attempt, and those that it found when it took over.
        """
        everything = self._everything()
        newest = newest_claim(self.run_dir)
        if newest is None:
            return everything
        adopted = {self.run_dir / name for name in newest.adopted} - self._abandoned
        return [each for each in everything if each.attempt >= newest.attempt or each.path in adopted]

    def abandon_after(self, restored: Path) -> None:
        """Later ones than the one that was restored do not count any more: they could not be read."""
        paths = self.paths()
        self._abandoned.update(paths[paths.index(restored) + 1 :])

    def names(self) -> list[str]:
        """The countable ones, relative to the run."""
        return [each.path.relative_to(self.run_dir).as_posix() for each in self.countable()]

    def paths(self) -> list[Path]:
        """Directories of the countable ones, oldest first."""
        return [each.path for each in self.countable()]

    def latest(self) -> Path | None:
        """The newest countable one with a readable manifest."""
        readable = self._readable()
        return readable[-1][0].path if readable else None

    def best(self) -> Path | None:
        """The one with the highest evaluation return, the newest of equals; it was saved after a whole epoch."""
        rated = [(metric, saved) for saved, metric in self._readable() if not saved.inside]
        return max(rated)[1].path if rated else None

    def pick(self, which: str | int) -> Path:
        """The checkpoint that a person names.

        Args:
            which (str or int): ``"best"`` by evaluation return, ``"last"`` (or ``"latest"``), or a number of epochs.

        Raises:
            ConfigurationError: if the name is unknown, or there is no such checkpoint; those that are there are listed.
        """
        word = str(which)
        if word not in WHICH and not word.isdecimal():
            raise ConfigurationError(
                f"which={which!r} is not one of {', '.join(WHICH)}, nor the number of an epoch that has a checkpoint."
            )
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
            raise ConfigurationError(f"{self.run_dir} has no checkpoint of epoch {word}; there are those of {listed}.")
        return max(found, key=lambda saved: (saved.attempt, not saved.inside)).path

    def newest_kept(self) -> list[Path]:
        """Those that resuming may fall back to; the best one may be much older."""
        return [saved.path for saved, _ in self._readable()[-self.keep_last :]]

    def prune(self) -> None:
        """Delete all but the newest and the best; also what attempts left that were killed while they saved."""
        assert self.claim is not None, "only the attempt that owns a run deletes"
        kept = {*self.newest_kept(), self.best()}
        for each in self._everything():
            if each.path not in kept and each.attempt <= self.claim.attempt:
                _remove(each.path)
        for leftover in self.directory.glob("attempt-*/.*"):
            shutil.rmtree(leftover)
        for folder in self.directory.glob("attempt-*"):
            if not any(folder.iterdir()):
                folder.rmdir()

    def _readable(self) -> list[tuple[Saved, float]]:
        rated = ((each, each.metric) for each in self.countable())
        return [(saved, metric) for saved, metric in rated if metric is not None]

    def _everything(self) -> list[Saved]:
        found = []
        for path in self.directory.glob("attempt-*/checkpoint-*"):
            attempt = path.parent.name.rpartition("-")[2]
            epoch, _, suffix = path.name.removeprefix("checkpoint-").partition("-")
            if attempt.isdigit() and epoch.isdigit() and suffix in ("", _INSIDE):
                found.append(Saved(int(attempt), int(epoch), suffix == _INSIDE, path))
        return sorted(found)


def _remove(path: Path) -> None:
    """Delete a folder, whole or not at all under its own name."""
    if not path.exists():
        return
    gone = path.with_name(f".{path.name.strip('.')}.deleted")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    failpoint("save.deleting")
    shutil.rmtree(gone)
