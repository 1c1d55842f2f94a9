"""From the plain values that Hydra hands over to constructors that want keys, tensors and specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import SliceSampler
from torchrl.modules import ProbabilisticActor

from pwm_torchrl.envs import LatentImaginationEnv
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

MISSING = "???"

#: What :func:`~pwm_torchrl.modules.make_dynamics` calls the classes of group ``network``.
DYNAMICS = {
    "pwm_torchrl.modules.MLPDynamics": {"kind": "mlp"},
    "pwm_torchrl.modules.ResidualDynamics": {"kind": "residual"},
    "pwm_torchrl.modules.ResidualEndpointFlow": {"kind": "flow", "parameterization": "residual_endpoint"},
    "pwm_torchrl.modules.TangentFlow": {"kind": "flow", "parameterization": "tangent"},
    "pwm_torchrl.modules.SimNormVelocityFlow": {"kind": "flow", "parameterization": "simnorm_velocity"},
}
#: What a world model and its dynamics have in common.
SHARED = ("latent_dim", "action_dim", "task_dim", "units", "simnorm_dim")


def world_model(*, dynamics: Mapping[str, Any], **spec: Any) -> WorldModel:
    """A world model of the fields of a :class:`~pwm_torchrl.modules.WorldModelSpec`.

    Args:
        dynamics (Mapping): arguments of :func:`~pwm_torchrl.modules.make_dynamics`, or an entry of group ``network``.
        spec (Any): the other fields.

    Raises:
        ConfigurationError: for dynamics that are none, or have other sizes than their world model.
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
    # Hydra leaves the default of the world model's dynamics, kind=mlp, beside an entry that is chosen.
    for key, default in (("kind", "mlp"), ("parameterization", None)):
        said = arguments.pop(key, None)
        if said not in (None, default, named.get(key)):
            raise ConfigurationError(f"world_model.dynamics.{key}={said!r} is not what _target_={target} says.")
    for key in SHARED:
        value = arguments.pop(key, None)
        preset = 8 if key == "simnorm_dim" else None  # a field that was not set has its constructor's value
        if value not in (None, preset, spec.get(key, preset)):
            raise ConfigurationError(
                f"world_model.dynamics.{key}={value} is not its world model's, {spec.get(key)}; set world_model.{key}."
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
    """A :class:`~pwm_torchrl.objectives.PWMActorLoss` whose mask may be lists."""
    if isinstance(action_mask, list):
        action_mask = torch.tensor(action_mask, dtype=torch.float32)
    return PWMActorLoss(*args, action_mask=action_mask, **settings)


def imagination_env(world_model: Any, **settings: Any) -> LatentImaginationEnv:
    """A :class:`~pwm_torchrl.envs.LatentImaginationEnv` whose mask and starts may be lists."""
    for name in ("action_mask", "start"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name], dtype=torch.float32)
    batch_size = settings.pop("batch_size", ())
    return LatentImaginationEnv(world_model, batch_size=batch_size, **_keys(settings))


def slice_sampler(**settings: Any) -> SliceSampler:
    """A :class:`~torchrl.data.SliceSampler` of lists where it wants tuples and tensors."""
    for name in ("ends", "trajectories"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name])
    if settings.get("end_keys") is not None:
        settings["end_keys"] = tuple(_key(key) for key in settings["end_keys"])
    return SliceSampler(**_keys(settings))


def _key(value: Any) -> Any:
    """A list as a nested key; of one part, that part."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def _keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _key(value) for name, value in settings.items()}
