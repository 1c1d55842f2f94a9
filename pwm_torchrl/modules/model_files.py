"""World models as files: weights in safetensors, everything else in JSON, so that other versions can read them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.modules.world_model import WorldModel, WorldModelSpec, make_world_model

WEIGHTS_FILE, CONFIG_FILE = "world_model.safetensors", "world_model.json"
FORMAT, VERSION = "pwm_torchrl.world_model", 1


@dataclass(frozen=True)
class WorldModelFacts:
    """What ``world_model.json`` says.

    Attributes:
        spec (WorldModelSpec): the architecture.
        task_names (tuple of str): tasks by index; empty for a single-task model.
        observation_dims (tuple of int): O of every task.
        sha256 (str): of the weights file, which pins what was trained on; empty while there are none.
        labels (dict): names of model and size, epochs, origin; for people.
    """

    spec: WorldModelSpec
    task_names: tuple[str, ...] = ()
    observation_dims: tuple[int, ...] = ()
    sha256: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether there are weights."""
        return bool(self.sha256)


def announce_world_model(folder: str | Path, facts: WorldModelFacts) -> None:
    """Describe a world model that will be trained, so that what is planned with it can be checked; without weights.

    Args:
        folder (str or Path): where :func:`save_world_model` will write it; created. What is there already stays.
        facts (WorldModelFacts): what it will be.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_FILE).exists():
        _describe(folder, replace(facts, sha256=""), None)


def save_world_model(
    folder: str | Path,
    world_model: WorldModel,
    spec: WorldModelSpec,
    *,
    task_names: Sequence[str] = (),
    observation_dims: Sequence[int] = (),
    labels: dict[str, Any] | None = None,
) -> WorldModelFacts:
    """Write ``world_model.safetensors`` and ``world_model.json`` into ``folder``, which is created.

    The JSON, which names the weights' hash, is written last and whole: a reader finds the old model or the new one.

    Args:
        folder (str or Path): where to.
        world_model (WorldModel): the model.
        spec (WorldModelSpec): its architecture.

    Keyword Args:
        task_names (sequence of str): tasks by index. Defaults to none.
        observation_dims (sequence of int): O of every task. Defaults to none.
        labels (dict, optional): more for people to read; plain values.

    Returns:
        WorldModelFacts: what was written.

    Raises:
        MissingLibraryError: if safetensors is not installed.
    """
    save = _safetensors().save
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in world_model.state_dict().items()})
    facts = WorldModelFacts(
        spec, tuple(task_names), tuple(observation_dims), hashlib.sha256(content).hexdigest(), labels or {}
    )
    # Weights of another model never lie under the name that the JSON refers to.
    weights = _weights(folder, facts)
    _replace(weights, content)
    _describe(folder, facts, weights.name)
    for old in folder.glob(f"*.{WEIGHTS_FILE}"):
        if old != weights:
            old.unlink()
    return facts


def world_model_facts(folder: str | Path) -> WorldModelFacts:
    """What a saved world model is, without its weights; needs no torch.

    Args:
        folder (str or Path): of :func:`save_world_model`, or a run directory that has one as ``world_model/``.

    Raises:
        ConfigurationError: if there is none, or it cannot be read by this version.
    """
    file = _folder(folder) / CONFIG_FILE
    content = _read_json(file)
    spec = content["spec"]
    known = {each.name for each in fields(WorldModelSpec)}
    unknown = sorted(spec.keys() - known)
    if unknown:
        raise ConfigurationError(
            f"The world model {file.parent} has {', '.join(unknown)} that this version of pwm_torchrl does not know; "
            "update pwm_torchrl."
        )
    return WorldModelFacts(
        WorldModelSpec(**spec),
        tuple(content["task_names"]),
        tuple(content["observation_dims"]),
        content["sha256"],
        dict(content.get("labels", {})),
    )


def read_world_model(
    folder: str | Path, sha256: str | None = None, reward_space: str | None = None
) -> tuple[WorldModel, WorldModelFacts]:
    """A saved world model, in float32 on the CPU.

    Args:
        folder (str or Path): as for :func:`world_model_facts`.
        sha256 (str, optional): hash that the weights must have. Defaults to ``None``, the one that its JSON names.
        reward_space (str, optional): the space in which a two-hot reward is decoded, instead of the saved one.

    Raises:
        ConfigurationError: if there is none, its weights are damaged or others than ``sha256`` says.
        MissingLibraryError: if safetensors is not installed.
    """
    load = _safetensors().load
    facts = world_model_facts(folder)
    if reward_space is not None:
        facts.spec.reward_space = reward_space
    home = _folder(folder)
    if not facts.trained:
        raise ConfigurationError(f"The world model {home} is announced, and has no weights yet: pre-train it first.")
    if sha256 is not None and sha256 != facts.sha256:
        raise ConfigurationError(
            f"The world model in {home} is not the one that the run began with: its hash is {facts.sha256[:12]} now, "
            f"it was {sha256[:12]}."
        )
    weights = _weights(home, facts)
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The weights {weights} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(content).hexdigest() != facts.sha256:
        raise ConfigurationError(f"The weights {weights} are damaged: they do not have the hash that belongs to them.")
    state = load(content)
    model = make_world_model(facts.spec)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ConfigurationError(f"The weights {weights} do not fit their {CONFIG_FILE}: {', '.join(wrong[:5])}.")
    model.load_state_dict(state)
    return model, facts


def _describe(folder: Path, facts: WorldModelFacts, weights: str | None) -> None:
    text = {"format": FORMAT, "version": VERSION, "weights": weights, **asdict(facts)}
    _replace(folder / CONFIG_FILE, (json.dumps(text, indent=2) + "\n").encode())


def _weights(folder: Path, facts: WorldModelFacts) -> Path:
    """The file of the weights, named by their hash."""
    return folder / f"{facts.sha256[:16]}.{WEIGHTS_FILE}"


def _folder(folder: str | Path) -> Path:
    """The folder with the JSON: the given one, or ``world_model`` in it."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "world_model"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    problem = "holds no world model" if path.exists() else "does not exist"
    first = f"; import it first: {typed('world_model')} import CHECKPOINT FOLDER"
    hint = first if path.suffix == ".pt" else ""
    raise ConfigurationError(
        f"world_model={folder} {problem}; give the directory of a pre-training run, or one with {CONFIG_FILE}{hint}; "
        "one that was moved is found beside its runs, or where the config.yaml of a run says (world_model)"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigurationError(f"{file} does not describe a world model of pwm_torchrl.")
    if content.get("version", 0) > VERSION:
        raise ConfigurationError(
            f"{file} was written by a newer pwm_torchrl (format {content['version']}, this one reads {VERSION}); "
            "update pwm_torchrl."
        )
    return content


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingLibraryError(
            "World models are saved with safetensors, which is not installed: pip install 'pwm-torchrl[launch]'"
        ) from error
    return safetensors.torch


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, and on the disk when this returns."""
    draft = path.with_name(f".{path.name}.new")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
