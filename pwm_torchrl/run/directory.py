"""Run directories: their ``config.yaml``, ``events.jsonl`` and ``summary.json``, how they are created and checked, and
which code a run uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pwm_torchrl
from pwm_torchrl.config import NETWORKS, RENAMED_KEYS, Config, in_present_unit, micro_batch_key, missing_keys
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.files import append_text, existing, read_object, write_durably
from pwm_torchrl.run.claims import refuse_owned
from pwm_torchrl.terminal import warn

__all__ = [
    "COMMIT_FILE",
    "RunDir",
    "check_run_dir",
    "checkout",
    "differing_keys",
    "discard",
    "git_commit",
    "load_config",
    "prepare_run_dir",
    "read_summary",
    "save_config",
    "set_status",
    "settings_of",
    "versions",
    "was_started",
]

CONFIG_FILE = "config.yaml"


def save_config(config: Config, run_dir: Path) -> None:
    """Write ``config.yaml`` unless its content is the same; ``run_dir`` is left out, so that a run can be moved."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create({**asdict(config), "run_dir": None}))
    target = run_dir / CONFIG_FILE
    if target.is_file() and target.read_bytes() == text.encode("utf-8"):
        return
    write_durably(target, text)


def load_config(run_dir: str | Path) -> Config:
    """Read the ``config.yaml`` of a run back into the schema.

    Raises:
        ConfigurationError: if there is none, or it does not fit the schema.
    """
    file = Path(run_dir) / CONFIG_FILE
    if not file.is_file():
        raise ConfigurationError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    try:
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise MissingLibraryError(
            "Reading a run's config.yaml needs OmegaConf: pip install 'pwm-torchrl[launch]'."
        ) from error
    try:
        content = OmegaConf.load(file)
        if not isinstance(content, DictConfig) or "run_dir" not in content:  # the last key that is written
            raise ConfigurationError(
                f"{file} is empty or cut short: its last key, run_dir, is missing; restore the whole file"
            )
        for key in missing_keys(OmegaConf.to_container(content)):
            raise ConfigurationError(f"{file}: {key} has no value; restore the run's value")
        rename_keys(content)
        stored: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigurationError(f"{file} does not fit this version at {key}: {str(error).splitlines()[0]}") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:  # OmegaConf raises OSError for a file of a single word
        raise ConfigurationError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from error
    return stored


def rename_keys(content: Any) -> None:
    """Rename the keys of an earlier version's configuration file to their present names, in place.

    Args:
        content (DictConfig): content of the file.
    """
    from omegaconf import OmegaConf

    for old, new in RENAMED_KEYS.items():
        section, _, leaf = old.rpartition(".")
        holder = OmegaConf.select(content, section)
        if holder is None or leaf not in holder:
            continue
        for key in new:
            OmegaConf.update(content, key, in_present_unit(old, holder[leaf]), force_add=True)
        del holder[leaf]


EVENTS_FILE = "events.jsonl"


def write_event(run_dir: Path, event: str, **details: Any) -> None:
    """Append an event with the time (UTC, ISO 8601).

    Args:
        run_dir (Path): the run's directory.
        event (str): ``start``, ``resume``, ``micro_batch`` (halved), ``quality`` or ``latent_collapse`` (a warning),
            ``unsaved`` (no checkpoint after a fault), ``unwatched`` (memory is not watched any more), and at the end a
            status: ``finished``, ``stopped``, ``failed``, ``memory`` or ``storage``, or ``refused`` if an attempt could
            not continue an earlier one and left it unchanged.
        details: plain values.

    Raises:
        OSError: if it cannot be written; the file is unchanged then.
    """
    record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details}
    with (run_dir / EVENTS_FILE).open("ab", buffering=0) as file:
        append_text(file, json.dumps(record) + "\n")


SUMMARY_FILE = "summary.json"


def was_started(run_dir: str | Path) -> bool:
    """Whether an earlier attempt left checkpoints, metrics or a summary."""
    return any((Path(run_dir) / name).exists() for name in ("checkpoints", "metrics.csv", SUMMARY_FILE))


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Content of the run's ``summary.json``; empty if the file is missing or damaged."""
    return read_object(Path(run_dir) / SUMMARY_FILE)


PLAN_FILE = "memory_plan.json"


def read_plan(run_dir: str | Path, without: str) -> dict[str, Any] | None:
    """The memory plan of the last attempt.

    Args:
        run_dir (str or Path): the run's directory.
        without (str): clause for the warning, which says what happens if the plan cannot be used.

    Returns:
        dict, optional: content of ``memory_plan.json``, with valid ``choices``, ``batches`` and ``prediction``;
        ``None`` if there is no plan or, with a warning, if it is damaged or from another version.
    """
    file = Path(run_dir) / PLAN_FILE
    content = read_object(file)
    if _is_plan(content):
        return content
    if file.exists():
        warn(f"{file} is damaged or of another version; {without}")
    return None


def _is_plan(content: dict[str, Any]) -> bool:
    choices, batches, prediction = (content.get(key) for key in ("choices", "batches", "prediction"))
    if not (isinstance(choices, dict) and isinstance(batches, dict) and isinstance(prediction, dict)):
        return False
    keys = [micro_batch_key(network) for network in NETWORKS]
    sizes = [choices.get(key, 0) for key in keys]
    return (
        set(choices) == {*keys, "checkpoint_substeps", "replay_storage"}
        and set(batches) <= set(NETWORKS)
        and all(_is_size(size) for size in (*batches.values(), *(size for size in sizes if size is not None)))
        and isinstance(choices.get("checkpoint_substeps"), bool)
        and isinstance(choices.get("replay_storage"), str)
        and isinstance(prediction.get("compute"), str)
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def pretraining_run(world_model: str | Path) -> Path | None:
    """The run directory of the pre-training that trains a world model; ``None`` if it does not belong to a run."""
    path = Path(world_model).expanduser()
    return next((each for each in (path, path.parent) if (each / CONFIG_FILE).is_file()), None)


def set_status(run_dir: str | Path, status: str, *, whatever_it_was: bool = False) -> None:
    """Set the status of a summary that still says ``running`` although its process has ended.

    With ``whatever_it_was``, set any status but ``finished``.
    """
    summary = read_summary(run_dir)
    said = summary.get("status")
    if said == "running" or (whatever_it_was and said not in (None, "finished")):
        _say(Path(run_dir), {**summary, "status": status})


def _say(run_dir: Path, summary: dict[str, Any]) -> None:
    write_durably(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


# Keys that do not change what a run learns: where it runs and logs, what it shows, how often it saves. The micro-batch
# size changes only rounding, and a run must be able to resume with a smaller one.
IGNORED = (
    "run_dir",
    "runs_dir",
    "pretraining",
    "cluster",
    "logger",
    "memory",
    "data.stage",
    "data.scratch_dir",
    "training.steps",  # converted to training.epochs
    "training.progress",
    "training.video",
    "training.threads",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.replay_storage",
    "training.check_graphs",
    "training.profile",
    "model.dynamics.checkpoint_substeps",
)


class RunDir(NamedTuple):
    """A run's directory.

    Attributes:
        path (Path): the directory.
        resume (bool): whether the run continues an earlier attempt.
        created (tuple of Path): directories that were created for it, outermost first; empty if it existed.
    """

    path: Path
    resume: bool
    created: tuple[Path, ...] = ()


def check_run_dir(config: Config) -> None:
    """Check whether :func:`prepare_run_dir` would raise an error; creates and changes nothing.

    Raises:
        ConfigurationError: as :func:`prepare_run_dir`.
    """
    key = "runs_dir" if config.run_dir is None else "run_dir"
    path = Path(config.runs_dir if config.run_dir is None else config.run_dir).expanduser().absolute()
    if config.run_dir is not None:
        _examine(path, config)
    try:
        place = existing(path)
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is not a directory")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{key}={path} cannot be written: {error.strerror}; set {key} to another folder"
        ) from error


def prepare_run_dir(config: Config, *, here: bool = False) -> RunDir:
    """Create or check the directory of a run, and save the configuration in it.

    Without ``config.run_dir``, a new directory is created under ``config.runs_dir``. With it, an empty or missing
    directory starts a new run. An unfinished run of the same configuration is resumed, and so is a run, finished or
    not, whose number of epochs was increased. Anything else raises an error.

    Args:
        config (Config): the run.
        here (bool): whether this process trains it. The configuration of an existing run is then saved only when the
            run is claimed (see :mod:`pwm_torchrl.run.claims`), because another process may claim it in the meantime.
            Defaults to ``False``.

    Raises:
        ConfigurationError: if the directory cannot be written, or contains something else, a run of another
            configuration (the message lists the differing keys), a finished run, or a run in use.
    """
    if config.run_dir is None:
        path, created = _new_directory(config)
    else:
        path = Path(config.run_dir).expanduser().absolute()
        _examine(path, config)
        created = _make_writable(path)
    if not here or not (path / CONFIG_FILE).is_file():
        if read_summary(path).get("status") == "finished":  # its number of epochs was increased
            _say(path, {**read_summary(path), "status": "stopped"})
        save_config(config, path)
    return RunDir(path, was_started(path), created)


def discard(run: RunDir) -> bool:
    """Delete the directory of a run that ended before it trained, if it was created for this run.

    Returns:
        bool: whether it was deleted; ``False`` if the directory existed before, or contains training results.
    """
    if run.path not in run.created or _has_trained(run.path):
        return False
    shutil.rmtree(run.path)
    for folder in reversed(run.created[:-1]):
        try:
            folder.rmdir()
        except OSError:  # no longer empty
            break
    return True


def _has_trained(path: Path) -> bool:
    """Whether there is a checkpoint, or a row of metrics."""
    checkpoints, metrics = path / "checkpoints", path / "metrics.csv"
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    return saved or (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 1)


def differing_keys(stored: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two configurations differ in a way that matters, with both values."""
    a, b = settings_of(stored), settings_of(asked)
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def settings_of(config: Config) -> dict[str, Any]:
    """Dotted keys that change what a run learns, with their values."""
    flat = flattened(dataclasses.asdict(config))
    if config.world_model_sha256 is not None:
        del flat["world_model"]  # the hash identifies it at any path
    return {k: v for k, v in flat.items() if not any(k == i or k.startswith(i + ".") for i in IGNORED)}


def keys_preventing_resume(stored: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """The :func:`differing_keys` that prevent a run from being continued with another configuration, with both values.

    The number of epochs may increase; schedules then extend over the new length. The path of the stored episodes may
    change; :class:`~pwm_torchrl.run.sources.StoredSource` checks that the episodes are the same.
    """
    differing = differing_keys(stored, asked)
    differing.pop("data.path", None)
    if asked.training.epochs > stored.training.epochs:
        differing.pop("training.epochs", None)
    return differing


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted keys; an empty dictionary is a value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(flattened(value, f"{prefix}{key}."))
        else:
            leaves[prefix + str(key)] = value
    return leaves


def _examine(path: Path, config: Config) -> None:
    """Raise ConfigurationError unless ``path`` is unused or holds a run that this configuration can continue."""
    try:
        empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise ConfigurationError(f"run_dir={path} cannot be read: {error.strerror}") from error
    if empty:
        return
    if not path.is_dir():
        raise ConfigurationError(f"run_dir={path} is a file; give a directory")
    if not (path / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"run_dir={path} is neither empty nor a run directory (it has no {CONFIG_FILE}); give another run_dir"
        )
    refuse_owned(path)
    stored = load_config(path)
    if read_summary(path).get("status") == "finished" and config.training.epochs <= stored.training.epochs:
        raise ConfigurationError(
            f"run_dir={path} holds a finished run of training.epochs={stored.training.epochs}; set more epochs to "
            "continue it, or set another run_dir, or none, for a new run"
        )
    differing = keys_preventing_resume(stored, config)
    if differing:
        lines = [f"  {key}: {old} there, {new} requested" for key, (old, new) in differing.items()]
        raise ConfigurationError(
            f"run_dir={path} holds a run of another configuration; give another run_dir, or the "
            "same settings:\n" + "\n".join(lines)
        )


def _new_directory(config: Config) -> tuple[Path, tuple[Path, ...]]:
    """Create a directory with a new name under ``runs_dir``; returns it and all directories created for it."""
    env = config.env.get("name") or config.env["_target_"]
    label = f"{env}_{config.model.name}_{config.size.name}_s{config.seed}"
    name = f"{label}_{time.strftime('%Y%m%d-%H%M%S')}"
    name = re.sub(r"[^\w.-]+", "-", name)
    runs = Path(config.runs_dir).expanduser().absolute()
    attempt = 1
    while True:
        path = runs / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            missing = _missing(path)
            path.mkdir(parents=True)
            return path, missing
        except FileExistsError as error:
            if not path.is_dir():
                raise ConfigurationError(f"runs_dir={config.runs_dir} is not a directory") from error
            attempt += 1
        except OSError as error:
            raise ConfigurationError(f"runs_dir={config.runs_dir} cannot be written: {error.strerror}") from error


def _make_writable(path: Path) -> tuple[Path, ...]:
    """Create ``run_dir`` if it does not exist, and check that it is writable; returns the directories created."""
    try:
        missing = _missing(path)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return missing
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigurationError(f"run_dir={path} cannot be written: {error.strerror}") from error
    return ()


def _missing(path: Path) -> tuple[Path, ...]:
    """The directories on a path that do not exist, outermost first."""
    there = existing(path)
    return tuple(each for each in reversed((path, *path.parents)) if each != there and each.is_relative_to(there))


# The code that a run uses ---------------------------------------------------------------------------------------------


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
