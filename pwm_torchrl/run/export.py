"""Exports a run's trained networks as a folder of safetensors, JSON and YAML files, without pickle or code.

The folder can be uploaded as a W&B artifact or to a model hub; :func:`~pwm_torchrl.load_policy` and
:func:`~pwm_torchrl.load_world_model` read it like a run directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pwm_torchrl import envs, modules
from pwm_torchrl.algorithm.base import find_algorithm
from pwm_torchrl.algorithm.build import Facts, Networks
from pwm_torchrl.config import ALGORITHMS, Config
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.modules import announce_world_model, world_model_facts
from pwm_torchrl.run.artifacts import json_text, write_atomically
from pwm_torchrl.run.directory import CONFIG_FILE, load_config, save_config

__all__ = [
    "EXPORT_FILE",
    "check_trusted",
    "fetched",
    "foreign_names",
    "is_export",
    "read_export",
    "require_hub",
    "write_export",
]

EXPORT_FILE = "pwm_torchrl.json"
HUB = "hf://"
FORMAT, VERSION = "pwm_torchrl.export", 1
WORLD_MODEL = "world_model"  # the architecture of the multi-task model that a policy was extracted from
#: Files to download from the hub, where a repository may contain any others.
_PATTERNS = ("*.safetensors", "*.json", "*.yaml", "world_model/*.json")
#: Names that a downloaded configuration may contain. They are exact: a prefix would allow everything that our modules
#: import.
_OURS = {f"pwm_torchrl.envs.{name}" for name in envs.__all__} | {
    f"pwm_torchrl.modules.{name}" for name in modules.__all__
}


def write_export(
    folder: Path, cfg: Config, networks: Networks, facts: Facts, epoch: int, summary: Mapping[str, Any]
) -> list[Path]:
    """Writes ``config.yaml``, ``pwm_torchrl.json``, ``summary.json`` and a ``.safetensors`` file for each network.

    Args:
        folder (Path): the folder to create.
        cfg (Config): the run.
        networks (Networks): the trained networks.
        facts (Facts): facts of the run's environment.
        epoch (int): epoch of the checkpoint that the networks are from.
        summary (mapping): content of the run's ``summary.json``.

    Returns:
        list of Path: the files.

    Raises:
        MissingLibraryError: if safetensors is not installed.
    """
    save_file = _safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, folder)
    files = [folder / CONFIG_FILE]
    for name, network in networks.items():
        file = folder / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}, file)
        files.append(file)
    if cfg.mode == "extract":
        announce_world_model(folder / WORLD_MODEL, world_model_facts(str(cfg.world_model)))
        files += sorted((folder / WORLD_MODEL).iterdir())
    files.append(write_atomically(folder / "summary.json", json_text(dict(summary))))
    content = {"format": FORMAT, "version": VERSION, "epoch": epoch, "facts": vars(facts)}
    files.append(
        write_atomically(folder / EXPORT_FILE, json_text(content))
    )  # last, because it marks the folder as complete
    return files


def is_export(folder: Path) -> bool:
    """Whether a folder was written by :func:`write_export`."""
    return (folder / EXPORT_FILE).is_file()


def read_export(folder: Path) -> tuple[Config, Networks, Facts, int]:
    """Configuration, networks, facts of the environment and epoch from an exported folder.

    Raises:
        ConfigurationError: if the folder is damaged, or from a later version.
        MissingLibraryError: if safetensors is not installed.
    """
    load_file = _safetensors().load_file
    try:
        content = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        found = (content["format"], content["version"])
        facts, epoch = Facts.restored(content["facts"]), int(content["epoch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{folder / EXPORT_FILE} is missing or damaged: {error!r}") from error
    if found != (FORMAT, VERSION):
        raise ConfigurationError(
            f"{folder / EXPORT_FILE} has format {found[0]} version {found[1]}; this version of pwm_torchrl reads "
            f"{FORMAT} version {VERSION}; update pwm_torchrl"
        )
    cfg = load_config(folder)
    if cfg.mode == "extract":
        cfg.world_model = str(folder / WORLD_MODEL)
    networks = find_algorithm(cfg.algorithm.name).build_networks(cfg, facts)
    for name, network in networks.items():
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            raise ConfigurationError(f"{folder} is incomplete: it has no {file.name}")
        _load_weights(network, load_file(file), file)
    return cfg, networks, facts, epoch


def fetched(run: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder of a run: downloaded if ``run`` is ``hf://ORG/NAME``, else ``run`` itself.

    Args:
        run (str or Path): run directory, exported folder or address on the Hugging Face hub.
        revision (str, optional): branch, tag or commit on the hub. Defaults to ``None``: the newest.
        trust_remote_code (bool): whether a downloaded configuration may name code of other packages. Defaults to
            ``False``.

    Raises:
        ConfigurationError: if the address is malformed or does not exist, or its content may not be loaded.
        MissingLibraryError: if huggingface_hub is not installed.
    """
    if not str(run).startswith(HUB):
        if revision is not None:
            raise ConfigurationError(
                f"revision={revision} belongs to an address on the hub, and {run} is a local folder"
            )
        return Path(run)
    name = str(run).removeprefix(HUB)
    hub = require_hub()
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, hub.errors.LocalEntryNotFoundError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise ConfigurationError(f"{run}{at} cannot be downloaded: {hub_message(error)}") from error
    if not is_export(folder):
        raise ConfigurationError(f"{run} holds no run of pwm_torchrl: it has no {EXPORT_FILE}")
    if not trust_remote_code:
        check_trusted(folder, str(run))
    return folder


def require_hub() -> Any:
    """The module ``huggingface_hub``.

    Raises:
        MissingLibraryError: if it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingLibraryError("hf:// needs huggingface_hub: pip install 'pwm-torchrl[hub]'") from error
    return huggingface_hub


def hub_message(error: Exception) -> str:
    """The first two lines of a hub error, as one line; the other lines are advice."""
    return " ".join([line for line in str(error).splitlines() if line.strip()][:2])


def check_trusted(folder: Path, source: str) -> None:
    """Raises an error for a downloaded configuration that names code of other packages.

    Args:
        folder (Path): the folder with ``config.yaml``.
        source (str): where the folder is from, for the message.

    Raises:
        ConfigurationError: if it names a class, function or module of another package.
    """
    names = list(foreign_names(load_config(folder)))
    if names:
        raise ConfigurationError(
            f"{source} names code that is not pwm_torchrl's: {', '.join(names)}. Loading it would import that code "
            "from this machine; if you trust it, pass trust_remote_code=True"
        )


def foreign_names(cfg: Config) -> Iterator[str]:
    """``key=value`` of every setting that makes this package import code of other packages.

    These are ``_target_`` anywhere below ``env``, gymnasium's ``id=module:Name``, dflex's ``module``, and algorithms
    and dynamics by their dotted path.
    """
    if cfg.algorithm.name not in {*ALGORITHMS, *ALGORITHMS.values()}:
        yield f"algorithm.name={cfg.algorithm.name}"
    kind = cfg.model.dynamics.kind
    if "." in kind and kind not in _OURS:
        yield f"model.dynamics.kind={kind}"
    yield from _foreign(cfg.env, "env")


def _foreign(tree: Any, prefix: str) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            name = f"{prefix}.{key}"
            if (
                (key == "_target_" and str(value) not in _OURS)
                or (key == "id" and ":" in str(value))
                or (key == "module" and value != "dflex.envs")
            ):
                yield f"{name}={value}"
            else:
                yield from _foreign(value, name)
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _foreign(value, f"{prefix}.{index}")


def _load_weights(network: nn.Module, state: dict[str, Any], file: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ConfigurationError(f"The weights {file} do not fit their configuration: {', '.join(wrong[:5])}")
    network.load_state_dict(state)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingLibraryError(
            "Exported networks need safetensors: pip install 'pwm-torchrl[launch]' or pip install safetensors"
        ) from error
    return safetensors.torch
