"""Errors that reach the user: one sentence each, naming the value, what is accepted and the key that sets it."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "LOST_RANKS",
    "ConfigurationError",
    "EnvironmentFault",
    "MissingLibraryError",
    "OutOfMemory",
    "RankFault",
    "StorageFault",
    "Superseded",
    "is_ours",
    "nearest",
    "require_installed",
    "said",
    "status_of",
]


class ConfigurationError(ValueError):
    """A configuration value that cannot work, found before anything runs."""


class MissingLibraryError(ConfigurationError, ImportError):
    """An optional library that the configuration needs and that cannot be imported."""


def require_installed(libraries: Iterable[str], by: str, how: str) -> None:
    """Raise MissingLibraryError for the first library that is not installed.

    Args:
        libraries (iterable of str): names as they are imported.
        by (str): the setting that needs them, ``env.id=ant``.
        how (str): the command that installs them.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise MissingLibraryError(f"{by} needs {library}, which is not installed: {how}")


class DivergenceError(FloatingPointError):
    """A loss or a gradient norm that is not finite."""


class GraphLeak(RuntimeError):
    """An epoch left autograd graphs behind (``training.check_graphs``)."""


class OutOfMemory(RuntimeError):
    """Memory that an update needs and cannot get, or the limit at which a run saves and stops."""


#: In the message of a rank that lost the connection to the others: the cause is in another rank, and a job's death is
#: classified by it.
LOST_RANKS = "cannot reach the others"


class RankFault(RuntimeError):
    """Another of the processes that train a run together failed or is gone, or they have drifted apart."""


class StorageFault(RuntimeError):
    """A disk that is full, over its quota or broken, or files of the run that are gone or cut short."""


class Superseded(RuntimeError):
    """Another attempt owns the run now; this one may write nothing more."""


class EnvironmentFault(RuntimeError):
    """An environment raised, or returned a value that is not finite.

    Args:
        name (str): name of the environment.
        problem (str): what happened, the end of the sentence.
        seed (int, optional): seed of the sub-environment. Defaults to ``None``.
        index (int, optional): position of the sub-environment in the batch. Defaults to ``None``.
    """

    def __init__(self, name: str, problem: str, *, seed: int | None = None, index: int | None = None) -> None:
        self.name = name
        self.problem = problem
        self.seed = seed
        self.index = index
        where = f"sub-environment {index} (seed {seed})" if index is not None else f"seed {seed}"
        super().__init__(f"environment {name}, {where}: {problem}")

    def __reduce__(self) -> tuple:
        # The default would call the constructor with the finished message only; jobs send errors across processes.
        return _rebuild_fault, (self.name, self.problem, self.seed, self.index)


def _rebuild_fault(name: str, problem: str, seed: int | None, index: int | None) -> EnvironmentFault:
    return EnvironmentFault(name, problem, seed=seed, index=index)


def is_ours(error: BaseException) -> bool:
    """Whether an exception is one of the package's own, whose message says all there is to say."""
    return any(c.__module__.split(".")[0] == "pwm_torchrl" for c in type(error).__mro__)


def status_of(error: BaseException) -> str:
    """Status of an attempt that an error ended: ``stopped``, ``superseded``, ``memory``, ``storage`` or ``failed``."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, Superseded):
        return "superseded"
    if isinstance(error, OutOfMemory):
        return "memory"
    return "storage" if isinstance(error, StorageFault) else "failed"


def said(error: BaseException) -> str:
    """What somebody else's code raised, in one line: type, text and the place, ``KeyError: 'x' (robot.py, line 7)``."""
    text = " ".join(str(error).split())[:300] or "no message"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is where we called it
    users = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    where = (users or frames)[-1:]
    return f"{type(error).__name__}: {text}" + "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in where)


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Readable list of the choices that look most like ``word``: ``"a, b or c"``; empty without a likely one."""
    choices = list(choices)
    folded = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), folded, n=count, cutoff=0.5)
    names = [folded[name] for name in found]
    return names[0] if len(names) == 1 else " or ".join([", ".join(names[:-1]), names[-1]]) if names else ""
