"""Errors that the user sees. Each is one sentence with the value, the accepted values and the config key."""

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
    """A configuration value is invalid; raised before the run starts."""


class MissingLibraryError(ConfigurationError, ImportError):
    """The configuration needs an optional library that cannot be imported."""


def require_installed(libraries: Iterable[str], by: str, how: str) -> None:
    """Raise MissingLibraryError for the first library that is not installed.

    Args:
        libraries (iterable of str): their import names.
        by (str): the setting that needs them, such as ``env.id=ant``.
        how (str): the command that installs them.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise MissingLibraryError(f"{by} needs {library}, which is not installed: {how}")


class DivergenceError(FloatingPointError):
    """A loss or a gradient norm is not finite."""


class GraphLeak(RuntimeError):
    """An epoch left autograd graphs behind (``training.check_graphs``)."""


class OutOfMemory(RuntimeError):
    """An update needs more memory than there is, or the run reached the limit at which it saves and stops."""


#: Part of the message of a rank that lost the connection to the others. The cause is in another rank; the code that
#: classifies failed jobs looks for this text.
LOST_RANKS = "cannot reach the others"


class RankFault(RuntimeError):
    """Another process of a distributed run failed or ended, or the processes no longer agree."""


class StorageFault(RuntimeError):
    """A disk is full, over its quota or broken, or files of the run are missing or truncated."""


class Superseded(RuntimeError):
    """Another attempt owns the run now, so this one must not write any more."""


class EnvironmentFault(RuntimeError):
    """An environment raised, or returned a value that is not finite.

    Args:
        name (str): name of the environment.
        problem (str): what happened; the message ends with it.
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
        # Jobs send errors between processes. The default would pass only the message to the constructor.
        return _rebuild_fault, (self.name, self.problem, self.seed, self.index)


def _rebuild_fault(name: str, problem: str, seed: int | None, index: int | None) -> EnvironmentFault:
    return EnvironmentFault(name, problem, seed=seed, index=index)


def is_ours(error: BaseException) -> bool:
    """Whether an exception is defined by this package; its message then needs no traceback."""
    return any(c.__module__.split(".")[0] == "pwm_torchrl" for c in type(error).__mro__)


def status_of(error: BaseException) -> str:
    """Status of an attempt that raised an error: ``stopped``, ``superseded``, ``memory``, ``storage``, ``failed``."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, Superseded):
        return "superseded"
    if isinstance(error, OutOfMemory):
        return "memory"
    return "storage" if isinstance(error, StorageFault) else "failed"


def said(error: BaseException) -> str:
    """An exception of foreign code in one line: type, text and place, ``KeyError: 'x' (robot.py, line 7)``."""
    text = " ".join(str(error).split())[:300] or "no message"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first frame is our own call
    users = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    where = (users or frames)[-1:]
    return f"{type(error).__name__}: {text}" + "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in where)


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices most similar to ``word`` as text, ``"a, b or c"``; empty if none is similar."""
    choices = list(choices)
    folded = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), folded, n=count, cutoff=0.5)
    names = [folded[name] for name in found]
    return names[0] if len(names) == 1 else " or ".join([", ".join(names[:-1]), names[-1]]) if names else ""
