"""TensorDict shells around the plain networks, with configurable keys."""

from __future__ import annotations

from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs import ExplorationType
from torchrl.modules import ProbabilisticActor, TanhNormal

from pwm_torchrl.modules.actor import Actor
from pwm_torchrl.modules.critic import CriticEnsemble
from pwm_torchrl.modules.task import TaskEmbedding
from pwm_torchrl.modules.world_model import WorldModel


class _Encode(nn.Module):
    """``WorldModel.encode`` as a module of its own."""

    def __init__(self, world_model: WorldModel) -> None:
        super().__init__()
        self.world_model = world_model

    def forward(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        return self.world_model.encode(observation, task)


class _MaskAction(nn.Module):
    """``TaskEmbedding.mask`` at work; a world model in two places of a policy would break functional calls."""

    action_mask: Tensor

    def __init__(self, embedding: TaskEmbedding) -> None:
        super().__init__()
        self.register_buffer("action_mask", embedding.action_mask, persistent=False)

    def forward(self, action: Tensor, task: Tensor) -> Tensor:
        return action * self.action_mask[task]


class _MinValue(nn.Module):
    """``CriticEnsemble.value`` as a module of its own."""

    def __init__(self, critics: CriticEnsemble) -> None:
        super().__init__()
        self.critics = critics

    def forward(self, latent: Tensor) -> Tensor:
        return self.critics.value(latent)


def encoder_module(
    world_model: WorldModel,
    *,
    observation: NestedKey = "observation",
    latent: NestedKey = "latent",
    task: NestedKey | None = None,
) -> TensorDictModule:
    """``observation`` (and ``task``) -> ``latent``."""
    in_keys = [observation] if task is None else [observation, task]
    return TensorDictModule(_Encode(world_model), in_keys=in_keys, out_keys=[latent])


def world_model_module(
    world_model: WorldModel,
    *,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    next_latent: NestedKey = ("next", "latent"),
    reward: NestedKey = ("next", "reward"),
    terminated: NestedKey = ("next", "terminated"),
    task: NestedKey | None = None,
) -> TensorDictModule:
    """One imagined step: ``latent``, ``action`` (and ``task``) -> ``next_latent``, ``reward``, ``terminated``."""
    in_keys = [latent, action] if task is None else [latent, action, task]
    return TensorDictModule(world_model, in_keys=in_keys, out_keys=[next_latent, reward, terminated])


def actor_module(
    actor: Actor,
    *,
    action_spec: TensorSpec | None = None,
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    loc: NestedKey = "loc",
    scale: NestedKey = "scale",
) -> ProbabilisticActor:
    """``latent`` -> ``loc``, ``scale`` -> ``action``: a :class:`~torchrl.modules.ProbabilisticActor` over TanhNormal.

    Follows TorchRL's exploration type: sampling by default, tanh(loc) under ``ExplorationType.DETERMINISTIC``.
    """
    return ProbabilisticActor(
        TensorDictModule(actor, in_keys=[latent], out_keys=[loc, scale]),
        in_keys={"loc": loc, "scale": scale},
        out_keys=[action],
        spec=action_spec,
        distribution_class=TanhNormal,
        default_interaction_type=ExplorationType.RANDOM,
    )


def value_module(
    critics: CriticEnsemble,
    *,
    latent: NestedKey = "latent",
    state_value: NestedKey = "state_value",
) -> TensorDictModule:
    """``latent`` -> ``state_value`` ``[..., 1]``, the minimum over the ensemble."""
    return TensorDictModule(_MinValue(critics), in_keys=[latent], out_keys=[state_value])


def policy_module(
    world_model: WorldModel,
    actor: Actor,
    *,
    action_spec: TensorSpec | None = None,
    observation: NestedKey = "observation",
    latent: NestedKey = "latent",
    action: NestedKey = "action",
    task: NestedKey | None = None,
) -> TensorDictSequential:
    """``observation`` -> ``latent`` -> ``action``: acts in an environment on encoded observations.

    With ``task``, the action's padding dimensions are zeroed.

    Raises:
        ValueError: if a single-task model gets a ``task``.
    """
    if task is not None and world_model.task is None:
        raise ValueError("This world model is single-task and takes no task index.")
    modules = [
        encoder_module(world_model, observation=observation, latent=latent, task=task),
        actor_module(actor, action_spec=action_spec, latent=latent, action=action),
    ]
    if task is not None and world_model.task is not None:
        modules.append(TensorDictModule(_MaskAction(world_model.task), in_keys=[action, task], out_keys=[action]))
    return TensorDictSequential(*modules)
