"""Specs of an imagination environment: from the model's layers, the caller, or a start state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

from pwm_torchrl.envs.latent_model import LatentModel
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import TaskWorldModel, WorldModel

__all__ = ["STEPS", "LatentSpecs", "check_mask", "check_task", "latent_specs", "task_masks"]

#: Steps since the start of a rollout, beside the state: the environment keeps nothing between two steps.
STEPS = "imagined_steps"


class LatentSpecs(NamedTuple):
    """Of one rollout, without batch."""

    state: Composite  # state entries and the task
    observation: Composite  # the same and, with a horizon, the count of steps
    action: Composite
    reward: TensorSpec
    done: Composite

    def batched(self, batch: torch.Size, device: torch.device) -> LatentSpecs:
        """The same for a batch of rollouts, on a device."""
        specs = [spec.to(device) for spec in self]
        return LatentSpecs(*(spec.expand(*batch, *spec.shape).clone() if batch else spec for spec in specs))


def latent_specs(
    model: LatentModel,
    module: nn.Module,
    horizon: int | None,
    action: TensorSpec | None = None,
    latent: TensorSpec | None = None,
) -> LatentSpecs:
    """Put together what is given and what a model of ours tells.

    Args:
        model (LatentModel): which entries there are.
        module (nn.Module): the world model itself.
        horizon (int, optional): of the environment.
        action (TensorSpec, optional): of one action.
        latent (TensorSpec, optional): of one state.

    Raises:
        ConfigurationError: if something is missing or does not fit.
    """
    latent_dim, action_dim = latent_and_action_dims(module)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if latent is None and latent_dim is not None:
        latent = Unbounded((latent_dim,), dtype=dtype)
    if latent is None:
        raise ConfigurationError("latent_spec is needed: neither world_model nor start tells what a state looks like.")
    if action is None and action_dim is not None:
        action = Bounded(-1.0, 1.0, torch.Size([action_dim]), dtype=dtype)
    if action is None:
        raise ConfigurationError("action_spec is needed: the world_model does not tell the range of actions.")
    if not isinstance(latent, Composite):
        latent = Composite({model.states[0]: latent})
    if set(latent.keys(True, True)) != set(model.states):
        raise ConfigurationError(
            f"latent_spec describes {sorted(map(str, latent.keys(True, True)))}, but states are made up of "
            f"{sorted(map(str, model.states))}."
        )
    state = latent.clone()
    if model.task is not None:
        masks = task_masks(module)
        count = torch.iinfo(torch.int64).max if masks is None else len(masks)
        state[model.task] = Categorical(count, torch.Size([]), dtype=torch.int64)
    observation = state.clone()
    if horizon is not None:
        observation[STEPS] = Unbounded((1,), dtype=torch.int64)
    done = {key: Categorical(2, torch.Size([1]), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
    return LatentSpecs(
        state, observation, Composite({model.action: action}), Unbounded((1,), dtype=dtype), Composite(done)
    )


def task_masks(module: nn.Module) -> Tensor | None:
    """Masks ``[num_tasks, A]`` of the actions of a model of ours with several tasks; ``None`` for any other."""
    return module.task.action_mask if isinstance(module, WorldModel) and module.task is not None else None


def check_task(model: LatentModel, task: int | None, masks: Tensor | None) -> None:
    """Raise ``ConfigurationError`` if there is no such task."""
    if task is None:
        return
    if model.task is None:
        raise ConfigurationError(f"task={task}, but the world_model reads no task; leave task out.")
    if task < 0 or (masks is not None and task >= len(masks)):
        raise ConfigurationError(
            f"task={task} is not one of the world_model's {'' if masks is None else f'{len(masks)} '}tasks."
        )


def check_mask(model: LatentModel, mask: Tensor | None) -> None:
    """Raise ``ConfigurationError`` if a mask has rows for tasks that the model does not tell apart."""
    if mask is not None and (mask.ndim not in (1, 2) or (mask.ndim == 2 and model.task is None)):
        raise ConfigurationError(
            f"action_mask of shape {list(mask.shape)} must be [A], or [num_tasks, A] where the world_model has tasks."
        )


def latent_and_action_dims(module: nn.Module) -> tuple[int | None, int | None]:
    """Widths D and A of a world model of ours, read from its layers; ``None`` where they cannot be."""
    if not isinstance(module, WorldModel):
        return None, None
    encoder, reward = (_linear_layers(part) for part in (module.encoder, module.reward))
    latent = encoder[-1].out_features if encoder else None
    if isinstance(module, TaskWorldModel):
        bound = module.bound_task
        return latent, module.model_action_dim if bound is None else int(bound.mask(module.task_index).sum())
    if module.task is not None:
        return latent, module.task.action_mask.shape[-1]
    return latent, reward[0].in_features - latent if reward and latent is not None else None


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
