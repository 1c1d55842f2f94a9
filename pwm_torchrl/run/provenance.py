"""The code that a run uses: the git commit and the versions of libraries."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pwm_torchrl

__all__ = ["COMMIT_FILE", "checkout", "git_commit", "versions"]

#: File in a copy of a checkout that contains the commit, because a copy has no ``.git``.
COMMIT_FILE = "git_commit.txt"

_LIBRARIES = ("torch", "torchrl", "tensordict", "numpy")
_TIMEOUT = 10.0  # seconds for git, which may hang on a slow file system


def checkout() -> Path:
    """The folder that holds this package: a checkout, a job's copy of one, or ``site-packages``."""
    return Path(pwm_torchrl.__file__).resolve().parent.parent


def git_commit(folder: Path | None = None) -> str | None:
    """The commit that is checked out in a folder, with ``-dirty`` at its end if tracked files differ from it.

    Args:
        folder: the top folder of a checkout, or a copy with a :data:`COMMIT_FILE`. Defaults to :func:`checkout`.

    Returns:
        40 hexadecimal digits and perhaps ``-dirty``; ``None`` if the folder is not the top of a repository with a
        commit, or git is not installed.
    """
    folder = checkout() if folder is None else folder
    recorded = folder / COMMIT_FILE
    if recorded.is_file():
        return recorded.read_text(encoding="utf-8").strip() or None
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that affect what a run computes."""
    found = {"python": platform.python_version(), "pwm_torchrl": pwm_torchrl.__version__}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
