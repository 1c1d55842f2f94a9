"""A copy of the code that a job runs: editing a checkout changes no job that is queued or comes back later.

The copy's name is the hash of its content, so that many runs of the same code share one. It lies beside the runs,
``runs/.code/<hash>``, where compute nodes see it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pwm_torchrl
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.provenance import COMMIT_FILE, git_commit

FOLDER = ".code"
#: Larger files of a user's folder are data, not code.
LARGEST_FILE = 1 << 20
LARGEST_COPY = 64 << 20
#: What code needs beside modules.
SUFFIXES = (".py", ".pyi", ".yaml", ".yml", ".toml", ".json", ".txt", ".csv", ".xml", ".npz", ".npy", ".so")
_SITE = ("site-packages", "dist-packages")
#: What lies beside the package in a checkout, and a file by which it is told from a folder of that name elsewhere.
BESIDE = (("configs", "config.yaml"), ("launch", "train.py"))


def snapshot(runs_dir: Path, targets: Iterable[str] = ()) -> list[Path]:
    """Copy this package, unless it is installed, and the user's code that the configuration names.

    Args:
        runs_dir (Path): where runs are made.
        targets (iterable of str): dotted names of the configuration, such as ``env._target_``.

    Returns:
        list of Path: folders to put first on the job's ``PYTHONPATH``.

    Raises:
        ConfigurationError: if the user's folder holds more than is taken for code.
    """
    package = Path(pwm_torchrl.__file__).resolve().parent
    copies = []
    if package.parent.name not in _SITE:
        parts = [package, *(package.parent / name for name, sign in BESIDE if (package.parent / name / sign).is_file())]
        files = [file for part in parts for file in _code_below(part)]
        copies.append(_copy(runs_dir, package.parent, files))
    for root in sorted({root for target in targets if (root := _user_root(target)) is not None}):
        if root != package.parent:
            copies.append(_copy(runs_dir, root, list(_users_files(root))))
    return copies


def targets_of(tree: Any) -> Iterator[str]:
    """Every dotted path of a configuration's plain values: of ``_target_``, and of a ``kind`` of dynamics."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(value, str) and (key == "_target_" or (key == "kind" and "." in value)):
                yield value
            else:
                yield from targets_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from targets_of(value)


def _user_root(target: str) -> Path | None:
    """The folder from which a name is imported, if that is a user's: neither installed nor part of Python."""
    name = target.split(".")[0]
    if name == pwm_torchrl.__name__:
        return None
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        place = Path(next(iter(spec.submodule_search_locations))).resolve().parent
    elif spec.origin and Path(spec.origin).exists():
        place = Path(spec.origin).resolve().parent
    else:
        return None
    installed = any(part in _SITE for part in place.parts) or place.is_relative_to(Path(os.__file__).resolve().parent)
    return None if installed or place.is_relative_to(sys.prefix) else place


def _users_files(root: Path) -> Iterator[Path]:
    """What git knows or would add, else everything that looks like code."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
        candidates: Iterable[Path] = (root / name for name in names)
    else:
        candidates = _code_below(root)
    for file in candidates:
        if file.is_file() and file.suffix in SUFFIXES and file.stat().st_size <= LARGEST_FILE:
            yield file


def _code_below(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "runs", "node_modules")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            file = Path(folder) / name
            if file.suffix in SUFFIXES:
                yield file


def _copy(runs_dir: Path, root: Path, files: list[Path]) -> Path:
    total = sum(file.stat().st_size for file in files)
    if total > LARGEST_COPY:
        raise ConfigurationError(
            f"The code in {root} that a job would be given a copy of comes to {total / 2**20:.0f} MiB, more than "
            f"{LARGEST_COPY >> 20} MiB; import your module from a folder that holds code only, or make it a git "
            "repository that ignores its data."
        )
    digest = hashlib.sha256()
    contents: list[tuple[Path, bytes]] = []
    for file in sorted(files):
        relative, data = file.relative_to(root), file.read_bytes()
        contents.append((relative, data))
        digest.update(f"{relative.as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    target = runs_dir / FOLDER / digest.hexdigest()[:20]
    if target.is_dir():
        return target
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    for relative, data in contents:
        place = draft / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    commit = git_commit(root)
    if commit is not None:
        (draft / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
    try:
        draft.rename(target)
    except OSError:  # somebody else was first
        if not target.is_dir():
            raise
        shutil.rmtree(draft)
    return target
