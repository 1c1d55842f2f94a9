"""One attempt at a time in a run directory: numbered claims, and who may take over.

An attempt owns a run by the file ``attempts/000003.json``, which is created exclusively and complete, also on a network
file system. The highest number owns the run. Before the next one is created, the owner must have said that it ended
(``attempts/000003.outcome.json``), or its end must be known from SLURM or from the process table; ages of files say
nothing, since clocks differ and a process may be slow. An attempt that was taken over all the same notices at its next
step and stops; what it saved since then is never continued from, because its successor notes the checkpoints that it
found.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pwm_torchrl.data.files import sync_folder, write_durably
from pwm_torchrl.errors import ConfigurationError, Superseded
from pwm_torchrl.training.owners import ALIVE, ENDED, Identity, describe, owner_state

FOLDER = "attempts"
#: Seconds for which a new attempt waits for one that is just ending.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Claim:
    """The content of a claim's file.

    Attributes:
        attempt (int): its number, from 1.
        owner (Identity): the process that made it.
        adopted (list of str): checkpoints of earlier attempts that it may continue from, relative to the run.
        time (str): UTC, ISO 8601; for people.
    """

    attempt: int
    owner: Identity
    adopted: list[str] = field(default_factory=list)
    time: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the owner's facts beside the rest."""
        return {"attempt": self.attempt, **asdict(self.owner), "time": self.time, "adopted": self.adopted}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Claim:
        """The inverse of :meth:`as_dict`."""
        owner = {name: content[name] for name in Identity.__dataclass_fields__}
        return cls(int(content["attempt"]), Identity(**owner), list(content["adopted"]), str(content["time"]))


class RunClaim:
    """A run directory that this attempt owns; made by :func:`claimed`."""

    def __init__(self, run_dir: Path, claim: Claim) -> None:
        self.run_dir = run_dir
        self.attempt = claim.attempt
        self.adopted = claim.adopted
        self._successor = _file(run_dir, claim.attempt + 1)
        self.outcome: dict[str, Any] = {}

    def check(self) -> None:
        """Whether this attempt still owns the run.

        Raises:
            Superseded: if another attempt has taken over.
        """
        if self._successor.exists():
            raise Superseded(
                f"Attempt {self.attempt} of {self.run_dir} was superseded by attempt {self.attempt + 1}; it stops and "
                "leaves the run to that one."
            )

    def release(self) -> None:
        """Say that the attempt ended, and how."""
        write_durably(outcome_file(self.run_dir, self.attempt), json.dumps(self.outcome, indent=2, default=str) + "\n")


@contextlib.contextmanager
def claimed(run_dir: Path, adoptable: Sequence[str] = (), patience_s: float = PATIENCE_S) -> Iterator[RunClaim]:
    """Own a run directory inside the block.

    Args:
        run_dir (Path): the run's directory.
        adoptable (sequence of str): checkpoints that this attempt may continue from; see
            :func:`pwm_torchrl.training.checkpoint_store.countable`. Defaults to none.
        patience_s (float): how long a job waits for an owner that may be just ending. Defaults to ``60.0``.

    Raises:
        ConfigurationError: if another attempt owns it, or whether it does cannot be told.
    """
    claim = RunClaim(run_dir, _take(run_dir, list(adoptable), patience_s))
    try:
        yield claim
    finally:
        with contextlib.suppress(OSError):  # a full disk: the next attempt asks the process table instead
            claim.release()


def _take(run_dir: Path, adoptable: list[str], patience_s: float) -> Claim:
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + patience_s
    while True:
        newest = newest_claim(run_dir)
        if newest is not None and read_outcome(run_dir, newest.attempt) is None:
            state = owner_state(newest.owner)
            if state == ALIVE and Identity.here().job_id is not None and time.monotonic() < patience:
                time.sleep(0.5)  # a job that comes back may be here before its last life has ended
                continue
            if state != ENDED:
                raise _refusal(run_dir, newest, alive=state == ALIVE)
        claim = Claim(
            1 if newest is None else newest.attempt + 1,
            Identity.here(),
            adoptable,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        if _create(_file(run_dir, claim.attempt), json.dumps(claim.as_dict(), indent=2) + "\n"):
            return claim


def newest_claim(run_dir: Path) -> Claim | None:
    """The claim with the highest number; ``None`` if nobody ever claimed the run.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    files = [each for each in (run_dir / FOLDER).glob("*.json") if each.stem.isdigit()]
    if not files:
        return None
    newest = max(files)
    try:
        return Claim.from_dict(json.loads(newest.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{newest} is not a claim of this version ({error}); make sure that nothing trains in {run_dir}, then "
            "delete that file."
        ) from error


def open_owner(run_dir: Path) -> Identity | None:
    """The process that trains a run, or did last and ended without saying so; ``None`` if the last one said so.

    Raises:
        ConfigurationError: if its claim cannot be read.
    """
    newest = newest_claim(run_dir)
    return None if newest is None or read_outcome(run_dir, newest.attempt) is not None else newest.owner


def read_outcome(run_dir: Path, attempt: int) -> dict[str, Any] | None:
    """How an attempt said that it ended; ``None`` if it did not, or is not over."""
    try:
        content = json.loads(outcome_file(run_dir, attempt).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def outcome_file(run_dir: Path, attempt: int) -> Path:
    """Where an attempt says how it ended."""
    return run_dir / FOLDER / f"{attempt:06d}.outcome.json"


def _file(run_dir: Path, attempt: int) -> Path:
    return run_dir / FOLDER / f"{attempt:06d}.json"


def _create(target: Path, text: str) -> bool:
    """Create a file with all of its content, unless it exists; a link is atomic where an exclusive open may not be."""
    draft = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with target.open("x", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:
                return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(target.parent)
    return True


def _refusal(run_dir: Path, claim: Claim, *, alive: bool) -> ConfigurationError:
    owner = describe(claim.owner)
    if alive:
        return ConfigurationError(
            f"run_dir={run_dir} is in use by {owner}; wait for it, stop it, or give another run_dir."
        )
    return ConfigurationError(
        f"run_dir={run_dir} was claimed by {owner}, and whether that still runs cannot be told from here; make sure "
        f"that it does not, then delete {_file(run_dir, claim.attempt)}, or give another run_dir."
    )
