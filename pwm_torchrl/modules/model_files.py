"""World-model files: our own format, and those of other projects (TD-MPC2 checkpoints, PWM-style state dicts).

Our format stores weights in safetensors and everything else in JSON, so that other versions can read it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.files import replacing
from pwm_torchrl.modules.world_model import WorldModel, WorldModelSpec, make_world_model

# Our own files --------------------------------------------------------------------------------------------------------


WEIGHTS_FILE, CONFIG_FILE = "world_model.safetensors", "world_model.json"
FORMAT, VERSION = "pwm_torchrl.world_model", 1


@dataclass(frozen=True)
class WorldModelFacts:
    """Contents of ``world_model.json``.

    Attributes:
        spec (WorldModelSpec): the architecture.
        task_names (tuple of str): task names by index; empty for a single-task model.
        observation_dims (tuple of int): O of every task.
        sha256 (str): hash of the weights file, by which a run checks that its world model did not change; empty if
            there are no weights yet.
        labels (dict): names of model and size, epochs, origin; informational.
    """

    spec: WorldModelSpec
    task_names: tuple[str, ...] = ()
    observation_dims: tuple[int, ...] = ()
    sha256: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether weights have been saved."""
        return bool(self.sha256)


def announce_world_model(folder: str | Path, facts: WorldModelFacts) -> None:
    """Write the JSON of a world model that is still to be trained, so that later steps can be checked in advance.

    Args:
        folder (str or Path): where :func:`save_world_model` will write; created. An existing JSON is kept.
        facts (WorldModelFacts): description of the future model.
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
    """Write ``<hash>.world_model.safetensors`` and ``world_model.json`` into ``folder``, which is created.

    The JSON, which refers to the weights by hash, is written last and atomically: a reader finds either the old model
    or the new one.

    Args:
        folder (str or Path): target folder.
        world_model (WorldModel): the model.
        spec (WorldModelSpec): its architecture.

    Keyword Args:
        task_names (sequence of str): task names by index. Defaults to none.
        observation_dims (sequence of int): O of every task. Defaults to none.
        labels (dict, optional): further information for readers; plain values.

    Returns:
        WorldModelFacts: the contents of the JSON.

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
    # The file name contains the hash, so the old JSON never refers to the new weights.
    weights = _weights(folder, facts)
    _replace(weights, content)
    _describe(folder, facts, weights.name)
    for old in folder.glob(f"*.{WEIGHTS_FILE}"):
        if old != weights:
            old.unlink()
    return facts


def world_model_facts(folder: str | Path) -> WorldModelFacts:
    """Description of a saved world model, without its weights.

    Args:
        folder (str or Path): folder of :func:`save_world_model`, or a run directory with a ``world_model/`` in it.

    Raises:
        ConfigurationError: if there is none, or this version cannot read it.
    """
    file = _folder(folder) / CONFIG_FILE
    content = _read_json(file)
    spec = content["spec"]
    known = {each.name for each in fields(WorldModelSpec)}
    unknown = sorted(spec.keys() - known)
    if unknown:
        raise ConfigurationError(
            f"The world model {file.parent} has {', '.join(unknown)}, which this version of pwm_torchrl does not "
            "support; update pwm_torchrl."
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
    """Load a saved world model, in float32 on the CPU.

    Args:
        folder (str or Path): as for :func:`world_model_facts`.
        sha256 (str, optional): hash that the weights must have. Defaults to ``None``, the hash in the JSON.
        reward_space (str, optional): the space in which a two-hot reward is decoded, instead of the saved one.

    Raises:
        ConfigurationError: if there is none, or its weights are damaged or do not match ``sha256``.
        MissingLibraryError: if safetensors is not installed.
    """
    load = _safetensors().load
    facts = world_model_facts(folder)
    if reward_space is not None:
        facts.spec.reward_space = reward_space
    home = _folder(folder)
    if not facts.trained:
        raise ConfigurationError(f"The world model {home} has no weights yet: finish its pre-training first.")
    if sha256 is not None and sha256 != facts.sha256:
        raise ConfigurationError(
            f"The world model in {home} is not the one that the run began with: its hash is {facts.sha256[:12]}, "
            f"not {sha256[:12]}."
        )
    weights = _weights(home, facts)
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The weights {weights} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(content).hexdigest() != facts.sha256:
        raise ConfigurationError(f"The weights {weights} are damaged: their hash does not match their name.")
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
    """The weights file, named after its hash."""
    return folder / f"{facts.sha256[:16]}.{WEIGHTS_FILE}"


def _folder(folder: str | Path) -> Path:
    """The folder with the JSON: ``folder``, or ``world_model`` in it."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "world_model"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    problem = "holds no world model" if path.exists() else "does not exist"
    first = f"; import it first: {typed('world_model')} import CHECKPOINT FOLDER"
    hint = first if path.suffix == ".pt" else ""
    raise ConfigurationError(
        f"world_model={folder} {problem}; give the directory of a pre-training run, or one with {CONFIG_FILE}{hint}; "
        "if it was moved, keep it beside its runs, or set world_model in their config.yaml"
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
    """Write a file atomically; it is on the disk when this returns."""
    with replacing(path, durable=True) as draft:
        draft.write_bytes(content)


# Weights of other projects --------------------------------------------------------------------------------------------


#: Entries of TD-MPC2's agent that do not belong to the world model.
SKIPPED = re.compile(r"(_pi|_Qs|_target_Qs|_detach_Qs)([._]|$)|log_std_(min|dif)$")
#: Their names -> ours; the published encoder is a dictionary of encoders, and the one for vectors is called ``state``.
PREFIXES = (
    (re.compile(r"_encoder\.(?:state\.)?(?=\d)"), "encoder.net."),
    (re.compile(r"_(?:dynamics|velocity)\.(?=\d)"), "dynamics.net."),
    (re.compile(r"_reward\.(?=\d)"), "reward.net."),
    (re.compile(r"_termination\.(?=\d)"), "termination.net."),
    (re.compile(r"_task_emb\.(?=weight$)"), "task.embedding."),
)
ACTION_MASKS = "_action_masks"
#: Name prefixes that identify a state dict of this kind.
PARTS = ("_encoder", "_dynamics", "_velocity", "_reward")


@dataclass(frozen=True)
class LoadReport:
    """How the state dict of another project was loaded.

    Attributes:
        mapped (dict): their name -> our parameter.
        skipped (tuple of str): their entries that do not belong to a world model (policy and value networks).
        missing (tuple of str): our parameters without an entry; they keep their initialisation.
        spec (WorldModelSpec): the architecture inferred from the shapes.
    """

    mapped: dict[str, str]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]
    spec: WorldModelSpec


def load_tdmpc2_world_model(
    path: str | Path,
    *,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
    reward_space: str | None = None,
    action_dims: Sequence[int] | None = None,
    strict: bool = True,
) -> tuple[WorldModel, LoadReport]:
    """World model of a TD-MPC2 checkpoint (https://arxiv.org/abs/2310.16828), a file ``{"model": state_dict}``.

    Both of its layouts are supported: the current one, and the older one with separate Linear and LayerNorm modules.

    Widths, number of tasks and bins are inferred from the shapes; the arguments give what shapes do not determine.
    Policy and value networks are skipped by name.

    Args:
        path (str or Path): the checkpoint.

    Keyword Args:
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
        vmin (float): lowest reward bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest reward bin, symlog space. Defaults to ``10.0``.
        reward_space (str, optional): ``"raw"`` or ``"symlog"``. Defaults to ``"symlog"`` for multi-task checkpoints and
            ``"raw"`` for others.
        action_dims (sequence of int, optional): action dimension per task; required for a multi-task checkpoint without
            ``_action_masks``. Defaults to ``None``, read from the masks.
        strict (bool): raise if a parameter is missing from the file. Defaults to ``True``.

    Returns:
        tuple: the model in float32 on the CPU, and a :class:`LoadReport`.

    Raises:
        ConfigurationError: if the file is missing, truncated, of another format or another architecture.

    Examples:
        >>> from pwm_torchrl.modules import load_tdmpc2_world_model
        >>> model, report = load_tdmpc2_world_model("mt30-48M.pt")  # doctest: +SKIP
        >>> model.encode(observation, task)  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(
            f"The TD-MPC2 checkpoint {path} does not exist; give the path of a downloaded .pt file."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ConfigurationError(
            f"The TD-MPC2 checkpoint {path} cannot be read: it is truncated, or holds more than tensors "
            f"({type(error).__name__})."
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(str(name).partition(".")[0] in PARTS for name in _unwrapped(state)):
        raise ConfigurationError(
            f"The checkpoint {path} is not in TD-MPC2's format, a state dict with entries of {', '.join(PARTS)}, alone "
            'or under "model" of a dictionary.'
        )
    return load_pwm_world_model(
        state,
        simnorm_dim=simnorm_dim,
        vmin=vmin,
        vmax=vmax,
        reward_space=reward_space,
        action_dims=action_dims,
        strict=strict,
        origin=str(path),
    )


def load_pwm_world_model(
    state_dict: Mapping[str, Tensor],
    *,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
    reward_space: str | None = None,
    action_dims: Sequence[int] | None = None,
    solver: str = "heun",
    substeps: int = 2,
    strict: bool = True,
    origin: str = "state dict",
) -> tuple[WorldModel, LoadReport]:
    """World model of a state dict with names ``_encoder``, ``_dynamics`` or ``_velocity``, ``_reward``, ``_task_emb``.

    ``_dynamics`` gives PWM's MLP dynamics, ``_velocity`` the public fork's flow (``simnorm_velocity``); its solver
    cannot be inferred from the weights.

    Args:
        state_dict (mapping): their names -> tensors.

    Keyword Args:
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
        vmin (float): lowest reward bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest reward bin, symlog space. Defaults to ``10.0``.
        reward_space (str, optional): ``"raw"`` or ``"symlog"``. Defaults to ``"symlog"`` for multi-task models and
            ``"raw"`` for others.
        action_dims (sequence of int, optional): action dimension per task. Defaults to ``None``, read from
            ``_action_masks``.
        solver (str): solver of a flow. Defaults to ``"heun"``.
        substeps (int): substeps of a flow. Defaults to ``2``.
        strict (bool): raise if a parameter is missing. Defaults to ``True``.
        origin (str): name of the source in error messages. Defaults to ``"state dict"``.

    Returns:
        tuple: the model in float32 on the CPU, and a :class:`LoadReport`.

    Raises:
        ConfigurationError: for entries or shapes that do not form such a world model.
    """
    state_dict = _unwrapped(state_dict)
    older = _older_names(state_dict)
    before = {new: old for old, new in older.items()}
    state_dict = {older.get(name, name): value for name, value in state_dict.items()}
    mapped, skipped = _map_names(state_dict, origin)
    masks = state_dict.get(ACTION_MASKS)
    if action_dims is None and masks is not None:
        action_dims = [int(dim) for dim in masks.sum(-1)]
    weights = {ours: state_dict[theirs].float() for theirs, ours in mapped.items()}
    spec = _infer_spec(weights, action_dims, origin)
    spec.simnorm_dim, spec.vmin, spec.vmax = simnorm_dim, vmin, vmax
    spec.reward_space = reward_space or ("symlog" if spec.num_tasks else "raw")
    if any(name.startswith("_velocity.") for name in mapped):
        spec.dynamics = {
            "kind": "flow",
            "parameterization": "simnorm_velocity",
            "solver": solver,
            "substeps": substeps,
        }
        spec.action_dim -= 1  # the flow time is an input, too
    model = make_world_model(spec)
    wanted = model.state_dict()
    for name, tensor in weights.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            fits = list(wanted[name].shape) if name in wanted else "no such parameter"
            raise ConfigurationError(
                f"The {origin} does not hold a TD-MPC2 or PWM world model: {name} has shape {list(tensor.shape)}, "
                f"the architecture implied by the other entries has {fits}."
            )
    missing = tuple(name for name in wanted if name not in weights)
    if missing and strict:
        raise ConfigurationError(f"The {origin} lacks {', '.join(missing)} of the world model.")
    model.load_state_dict(weights, strict=False)
    if masks is not None:
        mapped[ACTION_MASKS] = "task.action_mask"
        if model.task is None or not torch.equal(masks.float(), model.task.action_mask):
            raise ConfigurationError(
                f"The _action_masks of the {origin} are not rows of ones followed by zeros that fit its tasks and "
                "action_dims."
            )
    return model, LoadReport({before.get(name, name): ours for name, ours in mapped.items()}, skipped, missing, spec)


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries without the name prefixes of ``torch.compile`` and data-parallel wrappers."""
    return {re.sub(r"(^|\.)(_orig_mod|module)\.", r"\1", str(name)): value for name, value in state_dict.items()}


def _older_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Map names of TD-MPC2's older layout to its current one; empty for the current layout.

    The older layout has a separate module for every Linear and LayerNorm, numbered within the enclosing ``Sequential``:
    ``_encoder.state.1`` and ``.2``, or ``_dynamics.0.0`` and ``.0.1``. The current one has a single layer with an
    ``ln``. The numbers differ, but their order is that of the layers, and a one-dimensional weight is a LayerNorm's.
    """
    places: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for name, value in state_dict.items():
        match = re.fullmatch(r"(_encoder(?:\.state)?|_dynamics|_reward|_termination)((?:\.\d+)+)\.(weight|bias)", name)
        if match and isinstance(value, Tensor):
            place = tuple(map(int, match[2].split(".")[1:]))
            places.setdefault(match[1], {}).setdefault(place, []).append(name)
    found = {}
    for part, modules in places.items():
        norms = {place for place, names in modules.items() if any(_is_norm(state_dict, name) for name in names)}
        if not norms:
            continue
        layer = -1
        for place in sorted(modules):
            layer += place not in norms
            inner = "ln." if place in norms else ""
            for name in modules[place]:
                found[name] = f"{part}.{layer}.{inner}{name.rpartition('.')[2]}"
    return found


def _is_norm(state_dict: Mapping[str, Any], name: str) -> bool:
    return name.endswith(".weight") and state_dict[name].ndim == 1


def _map_names(state_dict: Mapping[str, Tensor], origin: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """(their name -> ours, skipped names)."""
    mapped: dict[str, str] = {}
    skipped, unknown = [], []
    for name, value in state_dict.items():
        prefix = next(((p, ours) for p, ours in PREFIXES if p.match(name)), None)
        if SKIPPED.match(name):
            skipped.append(name)
        elif prefix and isinstance(value, Tensor):
            mapped[name] = prefix[0].sub(prefix[1], name, count=1)
        elif name != ACTION_MASKS:
            unknown.append(name)
    if unknown:
        hint = " (image encoders are not supported)" if any("rgb" in name for name in unknown) else ""
        raise ConfigurationError(
            f"The {origin} has entries that no TD-MPC2 or PWM world model has: {', '.join(unknown[:5])}{hint}."
        )
    return mapped, tuple(skipped)


def _infer_spec(weights: Mapping[str, Tensor], action_dims: Sequence[int] | None, origin: str) -> WorldModelSpec:
    """Architecture from shapes; ``action_dim`` is the rest of the dynamics' input width."""

    def layers(part: str) -> list[Tensor]:
        named = ((re.fullmatch(rf"{part}\.net\.(\d+)\.weight", name), w) for name, w in weights.items())
        found = sorted(((int(match[1]), w) for match, w in named if match), key=lambda item: item[0])
        if not found or [index for index, _ in found] != list(range(len(found))) or any(w.ndim != 2 for _, w in found):
            raise ConfigurationError(
                f"The {origin} does not hold a TD-MPC2 or PWM world model: the layers of its {part} are missing "
                "or incomplete."
            )
        return [w for _, w in found]

    encoder, dynamics, reward = layers("encoder"), layers("dynamics"), layers("reward")
    latent_dim = encoder[-1].shape[0]
    embedding = weights.get("task.embedding.weight")
    num_tasks, task_dim = (0, 0) if embedding is None else tuple(embedding.shape)
    if num_tasks and action_dims is None:
        raise ConfigurationError(
            f"The {origin} is multi-task but has no _action_masks; give action_dims, one action dimension per task."
        )
    bins = reward[-1].shape[0]
    return WorldModelSpec(
        observation_dim=encoder[0].shape[1] - task_dim,
        action_dim=dynamics[0].shape[1] - task_dim - latent_dim,
        latent_dim=latent_dim,
        units=tuple(w.shape[0] for w in dynamics[:-1]),
        encoder_units=tuple(w.shape[0] for w in encoder[:-1]),
        reward_head="scalar" if bins == 1 else "two_hot",
        num_bins=bins if bins > 1 else 101,
        termination=any(name.startswith("termination.") for name in weights),
        num_tasks=num_tasks,
        task_dim=task_dim,
        action_dims=tuple(action_dims or ()) if num_tasks else (),
    )
