"""Claims of a run directory, which one process owns at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import ConfigurationError, StorageFault, Superseded
from pwm_torchrl.files import read_object, sync_folder, write_durably
from pwm_torchrl.terminal import warn

ALIVE, ENDED, UNKNOWN = "alive", "ended", "unknown"
#: Timeout in seconds of a query to SLURM.
QUERY_TIMEOUT_S = 20
#: States in which processes of a job may exist.
WITH_PROCESSES = (
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"
)  # fmt: skip
_PROC = Path("/proc")


@dataclass(frozen=True)
class Identity:
    """Identifies a process, so that other processes and machines can check later whether it still runs.

    Attributes:
        job_id (str, optional): id of its SLURM job, ``123``, or ``123_4`` in an array; ``None`` outside of SLURM.
        restart_count (int): how often SLURM has requeued that job.
        host (str): name of the machine.
        boot_id (str, optional): the kernel's id of the machine's current boot.
        pid (int): process id.
        pid_namespace (str, optional): namespace of the process id; containers have their own.
        started (int, optional): start time of the process in clock ticks since boot, because process ids are reused.
    """

    job_id: str | None
    restart_count: int
    host: str
    boot_id: str | None
    pid: int
    pid_namespace: str | None
    started: int | None

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Identity:
        """This process."""
        environ = os.environ if environ is None else environ
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            slurm_job_id(environ),
            int(restarts) if restarts.isdigit() else 0,
            socket.gethostname(),
            _boot_id(),
            os.getpid(),
            _pid_namespace(),
            _started(os.getpid()),
        )


#: Owner of a claim that has ended and whose file cannot be read.
NOBODY = Identity(None, 0, "", None, 0, None, None)


def slurm_job_id(environ: Mapping[str, str] | None = None) -> str | None:
    """Id of the SLURM job that this process belongs to; ``None`` outside of one."""
    environ = os.environ if environ is None else environ
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environ.get("SLURM_JOB_ID") or None


def own_job(
    environ: MutableMapping[str, str] | None = None, ask_slurm: Callable[[str], str] | None = None
) -> str | None:
    """Id of the SLURM job that this process is in, ``None`` outside of one.

    A shell may still have the variables of a job that has ended. If SLURM reports that it has ended, the variables are
    removed with a warning, because the run's memory, CPUs and location would be read from them.

    Args:
        environ (MutableMapping, optional): environment variables. Defaults to ``None``, those of this process.
        ask_slurm (callable, optional): as for :func:`owner_state`. Defaults to ``None``: :func:`slurm_state`.
    """
    environ = os.environ if environ is None else environ
    job = slurm_job_id(environ)
    if job is None or (ask_slurm or slurm_state)(job) != ENDED:
        return job
    for name in [name for name in environ if name.startswith("SLURM_") and not name.startswith("SLURM_CONF")]:
        del environ[name]
    warn(f"SLURM_JOB_ID={job} is ignored: SLURM does not list this job as running")
    return None


def owner_state(owner: Identity, here: Identity | None = None, ask_slurm: Callable[[str], str] | None = None) -> str:
    """Whether an owner still runs.

    Args:
        owner (Identity): the process to check.
        here (Identity, optional): the process that checks. Defaults to ``None``: this one.
        ask_slurm (callable, optional): returns the state of a job from its id. Defaults to ``None``:
            :func:`slurm_state`.

    Returns:
        str: ``"alive"``, ``"ended"``, or ``"unknown"`` if this cannot be determined.
    """
    here = Identity.here() if here is None else here
    same_machine = owner.host == here.host and owner.boot_id == here.boot_id
    if same_machine and owner.pid_namespace == here.pid_namespace:
        return ALIVE if _same_process(owner) else ENDED
    if owner.job_id is not None:
        if owner.job_id == here.job_id and owner.restart_count < here.restart_count:
            return ENDED  # SLURM requeues a job only after all its processes have ended
        return (ask_slurm or slurm_state)(owner.job_id)
    if owner.host == here.host and not same_machine:
        return ENDED  # the machine was rebooted
    return UNKNOWN


def slurm_state(job_id: str) -> str:
    """``"alive"`` if processes of a SLURM job may exist, else ``"ended"``; ``"unknown"`` if SLURM does not answer."""
    if shutil.which("squeue") is None:
        return UNKNOWN
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    if answer.returncode != 0:
        # SLURM forgets only jobs that have ended; any other error is inconclusive.
        return ENDED if "Invalid job id" in answer.stderr else UNKNOWN
    states = answer.stdout.split()
    return ALIVE if any(state in WITH_PROCESSES for state in states) else ENDED


def describe(owner: Identity) -> str:
    """Description of an owner for messages."""
    job = "" if owner.job_id is None else f"SLURM job {owner.job_id}, "
    return f"{job}process {owner.pid} on {owner.host}"


def _same_process(owner: Identity) -> bool:
    started = _started(owner.pid)
    if started is None and not _PROC.is_dir():  # without /proc, check only whether the id is in use
        try:
            os.kill(owner.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return started is not None and owner.started in (None, started)


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; ``None`` if it does not exist or is a zombie."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str | None:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return None


FOLDER = "attempts"
#: Seconds that a new attempt waits for the previous one to end.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Claim:
    """Content of a claim's file.

    Attributes:
        attempt (int): number of the attempt, from 1.
        owner (Identity): the process that made the claim.
        adopted (list of str): checkpoints of earlier attempts that it may resume from, relative to the run directory;
            ``None`` if the file cannot be read.
        time (str): UTC, ISO 8601; only for information.
    """

    attempt: int
    owner: Identity
    adopted: list[str] | None = field(default_factory=list)
    time: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the fields of the owner are on the same level as the others."""
        return {"attempt": self.attempt, **asdict(self.owner), "time": self.time, "adopted": self.adopted}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Claim:
        """The inverse of :meth:`as_dict`."""
        owner = {name: content[name] for name in Identity.__dataclass_fields__}
        return cls(int(content["attempt"]), Identity(**owner), list(content["adopted"]), str(content["time"]))


class RunClaim:
    """A run directory that this attempt owns; created by :func:`claimed`."""

    def __init__(self, run_dir: Path, claim: Claim) -> None:
        self.run_dir = run_dir
        self.attempt = claim.attempt
        self.adopted = claim.adopted
        self._successor = _file(run_dir, claim.attempt + 1)
        self._folder = _folder(run_dir)
        self.outcome: dict[str, Any] = {}

    @property
    def gone(self) -> bool:
        """Whether the directory was deleted or moved, even if there is another one with the same name now."""
        return _folder(self.run_dir) != self._folder

    def deleted(self) -> StorageFault:
        """The error of a run whose directory was deleted or moved."""
        return StorageFault(
            f"The run's directory {self.run_dir} was deleted or moved during the run; nothing more is written. Resume "
            "the run where it was moved to, or begin a new one."
        )

    def check_there(self) -> None:
        """Check that the directory still exists.

        Raises:
            StorageFault: if it was deleted or moved.
        """
        if self.gone:
            raise self.deleted()

    def check(self) -> None:
        """Check that this attempt still owns the run, and that its directory exists.

        Raises:
            Superseded: if another attempt has taken over.
            StorageFault: if the directory was deleted or moved.
        """
        self.check_there()
        if self._successor.exists():
            raise Superseded(
                f"Attempt {self.attempt} of {self.run_dir} was superseded by attempt {self.attempt + 1}; it stops, "
                "and that attempt continues the run."
            )

    def release(self) -> None:
        """Record that the attempt has ended, with its outcome."""
        write_durably(outcome_file(self.run_dir, self.attempt), json.dumps(self.outcome, indent=2, default=str) + "\n")


def _folder(path: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; ``None`` if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def claimed(run_dir: Path, adoptable: Sequence[str] = (), patience_s: float = PATIENCE_S) -> Iterator[RunClaim]:
    """Claim a run directory for the duration of the block.

    Args:
        run_dir (Path): the run's directory.
        adoptable (sequence of str): checkpoints that this attempt may resume from; see
            :meth:`pwm_torchrl.run.checkpoints.CheckpointStore.resume_candidates`. Defaults to none.
        patience_s (float): seconds that a SLURM job waits for the previous owner to end. Defaults to ``60.0``.

    Raises:
        ConfigurationError: if another attempt owns it, or if this cannot be determined.
    """
    claim = RunClaim(run_dir, _take(run_dir, list(adoptable), patience_s))
    try:
        yield claim
    finally:
        with contextlib.suppress(OSError):  # full disk: the next attempt then checks whether this process runs
            claim.release()


def refuse_owned(run_dir: Path) -> None:
    """Raise an error for a run that another attempt owns, before anything is written to it.

    Raises:
        ConfigurationError: if another attempt owns it, or if this cannot be determined.
    """
    newest = newest_claim(run_dir)
    if newest is not None and read_outcome(run_dir, newest.attempt) is None:
        state = owner_state(newest.owner)
        if state != ENDED:
            raise _refusal(run_dir, newest, alive=state == ALIVE)


def _take(run_dir: Path, adoptable: list[str], patience_s: float) -> Claim:
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + patience_s
    while True:
        newest = newest_claim(run_dir)
        if newest is not None and read_outcome(run_dir, newest.attempt) is None:
            state = owner_state(newest.owner)
            if state == ALIVE and Identity.here().job_id is not None and time.monotonic() < patience:
                time.sleep(0.5)  # a requeued job may start before the processes of its previous attempt have ended
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
    """The claim with the highest number; ``None`` if the run was never claimed.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    files = [each for each in (run_dir / FOLDER).glob("*.json") if each.stem.isdigit()]
    if not files:
        return None
    newest = max(files)
    try:
        return Claim.from_dict(json.loads(newest.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        attempt = int(newest.stem)
        if read_outcome(run_dir, attempt) is not None:  # it has ended, so its owner does not matter
            return Claim(attempt, NOBODY, None)
        raise ConfigurationError(
            f"{newest} is not a claim of this version ({error}); make sure that nothing trains in {run_dir}, then "
            "delete that file."
        ) from error


def open_owner(run_dir: Path) -> Identity | None:
    """The newest owner of a run if it has not recorded an outcome: it still trains, or was killed. ``None`` otherwise.

    Raises:
        ConfigurationError: if its claim cannot be read.
    """
    newest = newest_claim(run_dir)
    return None if newest is None or read_outcome(run_dir, newest.attempt) is not None else newest.owner


def read_outcome(run_dir: Path, attempt: int) -> dict[str, Any] | None:
    """The outcome that an attempt recorded; ``None`` if it recorded none, or has not ended."""
    file = outcome_file(run_dir, attempt)
    return read_object(file) if file.exists() else None  # even a damaged file shows that the attempt has ended


def outcome_file(run_dir: Path, attempt: int) -> Path:
    """The file in which an attempt records its outcome."""
    return run_dir / FOLDER / f"{attempt:06d}.outcome.json"


def _file(run_dir: Path, attempt: int) -> Path:
    return run_dir / FOLDER / f"{attempt:06d}.json"


def _create(target: Path, text: str) -> bool:
    """Create a file with its whole content; returns False if it exists.

    A hard link is used because it is atomic on file systems where exclusive creation may not be.
    """
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
        except OSError:  # a file system without hard links
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
        f"run_dir={run_dir} was claimed by {owner}, and this machine cannot tell whether that is still running; make "
        f"sure that it is not, then delete {_file(run_dir, claim.attempt)}, or give another run_dir."
    )
