"""Copies the code that a job runs, so that editing a checkout does not change jobs that are queued or requeued.

A copy is named by the hash of its content, so that runs of the same code share one. It is stored with the runs in
``runs/.code/<hash>``, which compute nodes can read. Different copies share their identical files.

The copy of the user's code is the folder from which their module is imported, with all files that may be imported or
read, whether git tracks them or not. Run outputs, virtual environments, possible secrets and large data files are left
out; a warning lists secrets and large files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pwm_torchrl
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import amount, replacing
from pwm_torchrl.run.directory import COMMIT_FILE, git_commit
from pwm_torchrl.terminal import warn

FOLDER = ".code"
#: Folder of the file contents that copies share, named by their hashes.
SHARED_FILES = ".files"
#: Larger files in a user's folder count as data, not code.
LARGEST_FILE = 16 << 20
LARGEST_COPY = 256 << 20
MOST_FILES = 20_000
#: Suffixes of the files of this package that are copied.
SUFFIXES = (".py", ".pyi", ".yaml", ".yml", ".toml", ".json", ".txt", ".csv", ".xml", ".npz", ".npy", ".so")
#: File names that may belong to secrets.
_SECRET = re.compile(
    r"(.*\.(env|pem|key|p12|pfx|jks|keystore|kdbx|gpg|asc)|id_(rsa|dsa|ecdsa|ed25519).*|_?netrc"
    r"|(.*[_.-])?(credentials?|secrets?|passwords?|token|api_?keys?|service_account)([_.-].*)?"
    r"\.(json|ya?ml|toml|ini|cfg|txt|csv))",
    re.IGNORECASE,
)
#: Suffixes of files that programs write and that are not imported.
_WRITTEN = (".pyc", ".pyo", ".log", ".out", ".err", ".tmp", ".swp", ".ipynb")
_NO_CODE = ("__pycache__", "node_modules", "wandb", "mlruns", "lightning_logs")
#: Names that occur only in a folder of runs, of this package or of Hydra.
_HOLDERS = (FOLDER, ".jobs", ".hydra")
#: A folder with ``config.yaml`` and one of these is a run directory.
_OUTPUT = ("attempts", "metrics.csv", "events.jsonl", "summary.json")
_ENVIRONMENT = ("pyvenv.cfg", "conda-meta")
_SITE = ("site-packages", "dist-packages")
#: Folders beside the package in a checkout, each with a file that distinguishes it from other folders of that name.
SIBLING_FOLDERS = (("configs", "config.yaml"), ("launch", "train.py"))


def snapshot(runs_dir: Path, targets: Iterable[str] = ()) -> list[Path]:
    """Copy this package, unless it is installed, and the user's code that the configuration names.

    Args:
        runs_dir (Path): folder of the runs.
        targets (iterable of str): dotted paths in the configuration, such as the value of ``env._target_``.

    Returns:
        list of Path: folders to put first on the job's ``PYTHONPATH``.

    Raises:
        ConfigurationError: if the user's folder contains more bytes or files than code would.
    """
    package = Path(pwm_torchrl.__file__).resolve().parent
    copies = []
    if package.parent.name not in _SITE:
        parts = [
            package,
            *(package.parent / name for name, sign in SIBLING_FOLDERS if (package.parent / name / sign).is_file()),
        ]
        files = [file for part in parts for file in _own_code(part)]
        copies.append(_copy(runs_dir, package.parent, files))
    for root in sorted(_roots(targets)):
        if root != package.parent:
            found = _Found(root, runs_dir.absolute())
            found.walk(root)
            found.tell()
            copies.append(_copy(runs_dir, root, found.files))
    return copies


def targets_of(tree: Any) -> Iterator[str]:
    """Every dotted path in a configuration's plain values: values of ``_target_``, and of ``kind`` of dynamics."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(value, str) and (key == "_target_" or (key == "kind" and "." in value)):
                yield value
            else:
                yield from targets_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from targets_of(value)


def _roots(targets: Iterable[str]) -> set[Path]:
    """The folders from which the user's modules are imported: modules in the configuration, and those they import."""
    names = [target.split(".")[0] for target in targets]
    seen: set[str] = set()
    roots = set()
    while names:
        name = names.pop()
        if name in seen or name in sys.stdlib_module_names or name == pwm_torchrl.__name__:
            continue
        seen.add(name)
        root = _user_root(name)
        if root is not None:
            roots.add(root)
            loaded = [module for key, module in list(sys.modules.items()) if key.split(".")[0] == name]
            names += {used for module in loaded for used in _used_by(module)}
    return roots


def _used_by(module: ModuleType) -> Iterator[str]:
    """Top-level names of the modules from which a loaded module has imported something."""
    for value in list(vars(module).values()):
        name = None
        with contextlib.suppress(Exception):  # attribute access on other people's objects may raise anything
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str):
            yield name.split(".")[0]


def _user_root(name: str) -> Path | None:
    """The folder from which a module is imported; ``None`` if it is installed or part of Python."""
    try:
        spec = importlib.util.find_spec(name)
    except (ValueError, ImportError):  # __main__, and modules without a finder
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        place = Path(next(iter(spec.submodule_search_locations))).absolute().parent
    elif spec.origin and Path(spec.origin).exists():
        place = Path(spec.origin).absolute().parent
    else:
        return None
    real = place.resolve()
    installed = any(part in _SITE for part in real.parts) or real.is_relative_to(Path(os.__file__).resolve().parent)
    return None if installed or real.is_relative_to(sys.prefix) else place


def _own_code(root: Path) -> Iterator[Path]:
    """The files of this package."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            if Path(name).suffix in SUFFIXES:
                yield Path(folder) / name


@dataclass
class _Found:
    """The files of a user's folder that are copied for a job, and those that are left out.

    Attributes:
        root (Path): the folder.
        runs_dir (Path): folder of the runs, which may be inside ``root``.
    """

    root: Path
    runs_dir: Path
    files: list[Path] = field(default_factory=list)
    large: list[tuple[int, Path]] = field(default_factory=list)
    secret: list[Path] = field(default_factory=list)
    total: int = 0
    entered: set[Path] = field(default_factory=set)

    def walk(self, folder: Path) -> None:
        """Search a folder. Links to folders are followed, because modules may be imported through them, but only once.

        Raises:
            ConfigurationError: if there are more bytes or files than code would have.
        """
        real = folder.resolve()
        if real in self.entered or real == self.runs_dir.resolve():
            return
        self.entered.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError:  # no permission
            return
        names = {entry.name for entry in entries}
        if names & set(_ENVIRONMENT) or (folder != self.root and _is_output(names)):
            return
        for entry in entries:
            if entry.name in _NO_CODE:
                continue
            if entry.is_dir():
                if not entry.name.startswith(".") and not entry.name.endswith(".egg-info"):
                    self.walk(entry)
            elif entry.is_file():
                self._take(entry)

    def _take(self, file: Path) -> None:
        if _SECRET.fullmatch(file.name) or file.name.startswith(".env"):
            self.secret.append(file)
            return
        if file.name.startswith(".") or file.suffix in _WRITTEN or not os.access(file, os.R_OK):
            return
        size = file.stat().st_size
        if size > LARGEST_FILE:
            self.large.append((size, file))
            return
        self.files.append(file)
        self.total += size
        if self.total > LARGEST_COPY or len(self.files) > MOST_FILES:
            raise ConfigurationError(
                f"The code in {self.root}, which is copied for the job, is larger than {LARGEST_COPY >> 20} MiB or "
                f"{MOST_FILES:,} files; import your module from a folder that holds code only."
            )

    def tell(self) -> None:
        """Warn of the files that are left out."""
        left = [f"{self._name(file)} ({amount(size)})" for size, file in sorted(self.large, reverse=True)]
        if left:
            warn(
                f"the job's copy of {self.root} leaves out files above {LARGEST_FILE >> 20} MiB: {_listed(left)}; "
                "refer to them by absolute paths"
            )
        if self.secret:
            warn(
                f"the job's copy of {self.root} leaves out files that may be secret: "
                f"{_listed([self._name(file) for file in self.secret])}; pass secrets as environment variables"
            )

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_output(names: set[str]) -> bool:
    """Whether a folder with these entries is a run directory or a folder of runs."""
    if "__init__.py" in names:
        return False
    return bool(names & set(_HOLDERS)) or ("config.yaml" in names and bool(names & set(_OUTPUT)))


def _copy(runs_dir: Path, root: Path, files: list[Path]) -> Path:
    digest = hashlib.sha256()
    contents: list[tuple[Path, Path, str]] = []
    for file in sorted(files):
        relative, content = file.relative_to(root), _hash(file)
        contents.append((relative, file, content))
        digest.update(f"{relative.as_posix()}\0{content}\0".encode())
    target = runs_dir / FOLDER / digest.hexdigest()[:20]
    if target.is_dir():
        return target
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    shared = runs_dir / FOLDER / SHARED_FILES
    shared.mkdir(parents=True, exist_ok=True)
    for relative, file, content in contents:
        place = draft / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        _place(file, place, shared / content)
    draft.mkdir(parents=True, exist_ok=True)
    commit = git_commit(root)
    if commit is not None:
        (draft / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
    try:
        draft.rename(target)
    except OSError:  # another process was first
        if not target.is_dir():
            raise
        shutil.rmtree(draft)
    return target


def _place(file: Path, place: Path, shared: Path) -> None:
    """Put a file into a copy, as a hard link to the shared content; as a plain copy if that fails."""
    try:
        if not shared.exists():
            with replacing(shared, sweep=False) as draft:
                shutil.copy(file, draft)
        os.link(shared, place)
    except OSError:
        shutil.copy(file, place)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
