"""One task's view of a multi-task world model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.factory import WorldModelSpec
from pwm_torchrl.modules.world_model import WorldModel


class TaskWorldModel(WorldModel):
    """A multi-task world model bound to one of its tasks: to everything outside, a single-task model.

    Observations and actions have the task's own dimensions here and are padded with zeros inside, which is what the
    action mask does to the padding of wider ones. Parameters are shared with the multi-task model.

    Args:
        world_model (WorldModel): multi-task, or single-task for ``task=0``.
        spec (WorldModelSpec): its architecture.
        task (int): index of the task.
        observation_dim (int): O of the task.
        action_dim (int): A of the task.

    Raises:
        ConfigurationError: if the model does not have the task, or other dimensions for it.

    Examples:
        >>> from pwm_torchrl.modules import WorldModelSpec, make_world_model
        >>> spec = WorldModelSpec(8, 2, 16, [32], [32], num_tasks=2, task_dim=4, action_dims=(1, 2))
        >>> bound = TaskWorldModel(make_world_model(spec), spec, task=0, observation_dim=3, action_dim=1)
        >>> bound.encode(torch.zeros(5, 3)).shape
        torch.Size([5, 16])
    """

    task_index: Tensor

    def __init__(
        self, world_model: WorldModel, spec: WorldModelSpec, task: int, observation_dim: int, action_dim: int
    ) -> None:
        super().__init__(
            world_model.encoder,
            world_model.dynamics,
            world_model.reward,
            world_model.termination,
            observation_statistics=world_model.observation_statistics,
        )
        #: Not ``task``, whose presence makes a model ask for a task index.
        self.bound_task = world_model.task
        self.model_observation_dim, self.model_action_dim = spec.observation_dim, spec.action_dim
        self.register_buffer("task_index", torch.tensor(task), persistent=False)
        count = max(1, spec.num_tasks)
        if not 0 <= task < count:
            raise ConfigurationError(f"task={task} is not one of the world model's {count} tasks.")
        own = spec.action_dims[task] if spec.num_tasks else spec.action_dim
        if observation_dim > spec.observation_dim or action_dim != own:
            raise ConfigurationError(
                f"Task {task} of the world model has {own} action dimensions and at most {spec.observation_dim} of "
                f"observation, not {action_dim} and {observation_dim}."
            )

    def load_multi_task(self, world_model: WorldModel) -> None:
        """Take over the parameters of a multi-task model of the same architecture."""
        state = world_model.state_dict()
        self.load_state_dict({_bound_name(name): tensor for name, tensor in state.items()})

    def embed(self, task: Tensor | None = None) -> Tensor | None:
        """The bound task's embedding ``[E]``; ``None`` for a single-task model."""
        if task is not None:
            return super().embed(task)
        return None if self.bound_task is None else self.bound_task(self.task_index)

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """``action`` ``[..., A]`` padded to the model's width."""
        return F.pad(action, (0, self.model_action_dim - action.shape[-1]))

    def encode(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent ``[..., D]`` of the task's observations ``[..., O]``."""
        return super().encode(F.pad(observation, (0, self.model_observation_dim - observation.shape[-1])), task)


def _bound_name(name: str) -> str:
    return f"bound_{name}" if name.startswith("task.") else name
