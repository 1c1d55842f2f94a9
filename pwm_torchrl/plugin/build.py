"""Configuration classes for TorchRL's ConfigStore: this package's networks, losses, environments, sampler and trainer.

Each class is derived from the signature of the constructor that it configures, with its fields, types and defaults. If
a constructor needs keys, tensors or specs, which Hydra cannot express, Hydra calls a function of this module instead.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace, UnionType
from typing import Any, Optional, Union

import torch
from omegaconf import MISSING
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import SliceSampler
from torchrl.modules import ProbabilisticActor
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.data import SamplerConfig
from torchrl.trainers.algorithms.configs.envs import EnvConfig
from torchrl.trainers.algorithms.configs.modules import NetworkConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

from pwm_torchrl import modules, objectives
from pwm_torchrl.envs import LatentImaginationEnv, make_dm_control_env, make_gymnasium_env, make_task_env
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    WorldModel,
    WorldModelSpec,
    actor_module,
    encoder_module,
    make_world_model,
    policy_module,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss
from pwm_torchrl.plugin.trainer import make_torchrl_trainer
from pwm_torchrl.run.load import load_world_model

# Functions that Hydra calls: they convert plain values to keys, tensors and specs -------------------------------------


#: Arguments of :func:`~pwm_torchrl.modules.make_dynamics` for the dynamics classes of group ``network``.
DYNAMICS = {
    "pwm_torchrl.modules.MLPDynamics": {"kind": "mlp"},
    "pwm_torchrl.modules.ResidualDynamics": {"kind": "residual"},
    "pwm_torchrl.modules.ResidualEndpointFlow": {"kind": "flow", "parameterization": "residual_endpoint"},
    "pwm_torchrl.modules.TangentFlow": {"kind": "flow", "parameterization": "tangent"},
    "pwm_torchrl.modules.SimNormVelocityFlow": {"kind": "flow", "parameterization": "simnorm_velocity"},
}
#: Arguments that a world model and its dynamics share.
SHARED = ("latent_dim", "action_dim", "task_dim", "units", "simnorm_dim")


def world_model(*, dynamics: Mapping[str, Any], **spec: Any) -> WorldModel:
    """Make a world model from the fields of a :class:`~pwm_torchrl.modules.WorldModelSpec`.

    Args:
        dynamics (Mapping): arguments of :func:`~pwm_torchrl.modules.make_dynamics`, or an entry of group ``network``.
        spec (Any): the other fields.

    Raises:
        ConfigurationError: if ``dynamics`` is not a dynamics class, or has other sizes than the world model.
    """
    return make_world_model(WorldModelSpec(dynamics=_dynamics(dynamics, spec), **spec))


def _dynamics(given: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    if "_target_" not in given:
        return dict(given)
    target = given["_target_"]
    if target not in DYNAMICS:
        raise ConfigurationError(f"world_model.dynamics._target_={target!r} is not one of {', '.join(DYNAMICS)}.")
    arguments = {k: v for k, v in given.items() if not k.startswith("_") and v != MISSING}
    named = DYNAMICS[target]
    # If an entry is chosen, Hydra also keeps the default of the world model's dynamics, kind=mlp.
    for key, default in (("kind", "mlp"), ("parameterization", None)):
        said = arguments.pop(key, None)
        if said not in (None, default, named.get(key)):
            raise ConfigurationError(f"world_model.dynamics.{key}={said!r} contradicts _target_={target}.")
    for key in SHARED:
        value = arguments.pop(key, None)
        preset = 8 if key == "simnorm_dim" else None  # a field that was not set has its constructor's default
        if value not in (None, preset, spec.get(key, preset)):
            raise ConfigurationError(
                f"world_model.dynamics.{key}={value} differs from the world model's, {spec.get(key)}; set "
                f"world_model.{key}."
            )
    return {**named, **arguments}


def encoder_model(world_model: WorldModel, **keys: Any) -> TensorDictModule:
    """:func:`~pwm_torchrl.modules.encoder_module`."""
    return encoder_module(world_model, **_keys(keys))


def world_model_model(world_model: WorldModel, **keys: Any) -> TensorDictModule:
    """:func:`~pwm_torchrl.modules.world_model_module`."""
    return world_model_module(world_model, **_keys(keys))


def actor_model(actor: Any, **keys: Any) -> ProbabilisticActor:
    """:func:`~pwm_torchrl.modules.actor_module`."""
    return actor_module(actor, **_keys(keys))


def value_model(critics: Any, **keys: Any) -> TensorDictModule:
    """:func:`~pwm_torchrl.modules.value_module`."""
    return value_module(critics, **_keys(keys))


def policy_model(world_model: WorldModel, actor: Any, **keys: Any) -> TensorDictSequential:
    """:func:`~pwm_torchrl.modules.policy_module`."""
    return policy_module(world_model, actor, **_keys(keys))


def actor_loss(*args: Any, action_mask: Any = None, **settings: Any) -> PWMActorLoss:
    """A :class:`~pwm_torchrl.objectives.PWMActorLoss` that accepts lists for ``action_mask``."""
    if isinstance(action_mask, list):
        action_mask = torch.tensor(action_mask, dtype=torch.float32)
    return PWMActorLoss(*args, action_mask=action_mask, **settings)


def imagination_env(world_model: Any, **settings: Any) -> LatentImaginationEnv:
    """A :class:`~pwm_torchrl.envs.LatentImaginationEnv` that accepts lists for ``action_mask`` and ``start``."""
    for name in ("action_mask", "start"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name], dtype=torch.float32)
    batch_size = settings.pop("batch_size", ())
    return LatentImaginationEnv(world_model, batch_size=batch_size, **_keys(settings))


def slice_sampler(**settings: Any) -> SliceSampler:
    """A :class:`~torchrl.data.SliceSampler` that accepts lists for tuples and tensors."""
    for name in ("ends", "trajectories"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name])
    if settings.get("end_keys") is not None:
        settings["end_keys"] = tuple(_key(key) for key in settings["end_keys"])
    return SliceSampler(**_keys(settings))


def _key(value: Any) -> Any:
    """Convert a list to a nested key; a list of one element to that element."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def _keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _key(value) for name, value in settings.items()}


# Configuration classes from constructors ------------------------------------------------------------------------------


PLAIN = (bool, int, float, str)
BUILD = "pwm_torchrl.plugin.build."


def entry(
    name: str, base: type, made: Callable[..., Any], target: str, note: str = "", *, convert: bool = True, **more: Any
) -> type[Any]:
    """Create the Hydra configuration class of a constructor.

    Args:
        name (str): name of the configuration class.
        base (type): TorchRL's base class of the group.
        made (callable): the class or function whose parameters become the fields.
        target (str): dotted path that Hydra calls: that of ``made``, or of a function that converts Hydra's values to
            its arguments.
        note (str): text that is added to the docstring. Defaults to ``""``.

    Keyword Args:
        convert (bool): whether Hydra passes plain lists and dicts. Defaults to ``True``.
        **more: further fields for Hydra itself, with their values.
    """
    # A class's metaclass may hide the signature.
    function = made.__init__ if inspect.isclass(made) else made
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = _default(made, parameter)
        fields.append((parameter.name, _hint(function, parameter), _field(default)))
    own = {"_target_": target, **({"_convert_": "all"} if convert else {}), **more}
    fields += [(key, type(value), dataclasses.field(default=value)) for key, value in own.items()]
    cls = dataclasses.make_dataclass(name, fields, bases=(base,))
    role = "class" if inspect.isclass(made) else "func"
    public = f"{made.__module__}.{made.__qualname__}" if target.startswith(BUILD) else target
    cls.__doc__ = f"Hydra configuration for :{role}:`~{public}`.{note and f' {note}'}"
    cls.__module__ = __name__
    return cls


def _default(made: Any, parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(made):  # its signature does not show the results of default factories
        field = next(field for field in dataclasses.fields(made) if field.name == parameter.name)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return MISSING if parameter.default is inspect.Parameter.empty else parameter.default


def _hint(function: Any, parameter: inspect.Parameter) -> Any:
    """A parameter's type for OmegaConf; ``Any`` for unsupported types, which the constructor itself checks."""
    written = SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        hint = typing.get_type_hints(written, function.__globals__)["it"]
    except NameError:  # a type that is imported for type checkers only
        return Any
    if typing.get_origin(hint) in (Union, UnionType) and len(typing.get_args(hint)) == 2:
        kind = next((each for each in typing.get_args(hint) if each is not type(None)), Any)
        if type(None) in typing.get_args(hint) and kind in PLAIN:
            return Optional[kind]
    if typing.get_origin(hint) in (list, Sequence) and typing.get_args(hint) == (int,):
        return list[int]
    return hint if hint in PLAIN else Any


def _field(default: Any) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default))
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default))
    return dataclasses.field(default=default)


@dataclasses.dataclass
class PWMModelConfig(ConfigBase):
    """Base class of the entries of group ``model``."""

    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing to do."""


# Networks -------------------------------------------------------------------------------------------------------------


def _network(name: str, made: type, note: str = "") -> type[Any]:
    return entry(name, NetworkConfig, made, f"pwm_torchrl.modules.{made.__name__}", note)


MLPDynamicsConfig = _network("MLPDynamicsConfig", modules.MLPDynamics)
ResidualDynamicsConfig = _network("ResidualDynamicsConfig", modules.ResidualDynamics)
SimNormVelocityFlowConfig = _network("SimNormVelocityFlowConfig", modules.SimNormVelocityFlow)
TangentFlowConfig = _network("TangentFlowConfig", modules.TangentFlow)
ResidualEndpointFlowConfig = _network("ResidualEndpointFlowConfig", modules.ResidualEndpointFlow)
PWMWorldModelConfig = entry(
    "PWMWorldModelConfig",
    NetworkConfig,
    modules.WorldModelSpec,
    BUILD + "world_model",
    "``dynamics`` holds keyword arguments of :func:`~pwm_torchrl.modules.make_dynamics`, or one of this group's "
    "dynamics: ``network@trainer.world_model.dynamics: pwm_flow``. Sizes that those leave open are the world model's.",
    _recursive_=False,  # the dynamics' sizes are the world model's, so it is built together with them
)
PWMActorConfig = _network("PWMActorConfig", modules.Actor)
PWMCriticEnsembleConfig = _network("PWMCriticEnsembleConfig", modules.CriticEnsemble)

# Models ---------------------------------------------------------------------------------------------------------------


def _model(name: str, made: Callable[..., Any], builder: str) -> type[Any]:
    return entry(name, PWMModelConfig, made, BUILD + builder)


PWMEncoderModelConfig = _model("PWMEncoderModelConfig", modules.encoder_module, "encoder_model")
PWMWorldModelModelConfig = _model("PWMWorldModelModelConfig", modules.world_model_module, "world_model_model")
PWMActorModelConfig = _model("PWMActorModelConfig", modules.actor_module, "actor_model")
PWMCriticEnsembleModelConfig = _model("PWMCriticEnsembleModelConfig", modules.value_module, "value_model")
PWMPolicyModelConfig = _model("PWMPolicyModelConfig", modules.policy_module, "policy_model")
PWMTrainedWorldModelConfig = entry(
    "PWMTrainedWorldModelConfig", PWMModelConfig, load_world_model, "pwm_torchrl.load_world_model"
)

# Losses ---------------------------------------------------------------------------------------------------------------

PWMModelLossConfig = entry(
    "PWMModelLossConfig", LossConfig, objectives.PWMModelLoss, "pwm_torchrl.objectives.PWMModelLoss", convert=False
)
PWMActorLossConfig = entry(
    "PWMActorLossConfig",
    LossConfig,
    objectives.PWMActorLoss,
    BUILD + "actor_loss",
    "``action_mask`` may be lists of 0 and 1.",
)
PWMValueLossConfig = entry(
    "PWMValueLossConfig", LossConfig, objectives.PWMValueLoss, "pwm_torchrl.objectives.PWMValueLoss", convert=False
)

# Environments ---------------------------------------------------------------------------------------------------------

PWMImaginationEnvConfig = entry(
    "PWMImaginationEnvConfig",
    EnvConfig,
    LatentImaginationEnv,
    BUILD + "imagination_env",
    "``world_model`` is made with the environment, for example ``model@env.world_model: pwm_trained_world_model``; one "
    "that is still learning is given in code, since Hydra would make it again.",
)
PWMMultitaskEnvConfig = entry(
    "PWMMultitaskEnvConfig", EnvConfig, make_task_env, "pwm_torchrl.envs.make_task_env", convert=False
)
PWMGymnasiumEnvConfig = entry(
    "PWMGymnasiumEnvConfig",
    EnvConfig,
    make_gymnasium_env,
    "pwm_torchrl.envs.make_gymnasium_env",
    "Arguments of the environment itself are added: ``+env.healthy_reward=0``.",
    convert=False,
)
PWMDMControlEnvConfig = entry(
    "PWMDMControlEnvConfig", EnvConfig, make_dm_control_env, "pwm_torchrl.envs.make_dm_control_env", convert=False
)

# Sampler and trainer --------------------------------------------------------------------------------------------------

PWMSliceSamplerConfig = entry(
    "PWMSliceSamplerConfig",
    SamplerConfig,
    SliceSampler,
    BUILD + "slice_sampler",
    "TorchRL's own ``slice`` hands ``('next', 'truncated')`` over as a ``ListConfig``, with which sampling fails.",
)
PWMTrainerConfig = entry(
    "PWMTrainerConfig",
    TrainerConfig,
    make_torchrl_trainer,
    "pwm_torchrl.training.make_torchrl_trainer",
    "Trains by ``algorithm=pwm_paper``, the published algorithm, and not by ``algorithm=pwm``, the default of runs. "
    "World model, actor and critics are described here, once; collector and losses have ``_partial_: true`` and get "
    "them from the trainer, so that all parts share one set of networks. ``algorithm`` holds keys of "
    ":class:`~pwm_torchrl.config.AlgorithmConfig`.",
)
