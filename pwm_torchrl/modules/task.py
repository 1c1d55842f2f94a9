"""Task conditioning of multi-task models: embedding and action mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.layers import init_world_model_weights


class TaskEmbedding(nn.Module):
    """Learned task vectors of norm at most 1, and the mask of each task's real action dimensions.

    Args:
        num_tasks (int): number of tasks.
        task_dim (int): embedding width, E.
        action_dims (sequence of int): action dimension of every task.
        action_dim (int): width to which actions are padded; at least ``max(action_dims)``.

    Raises:
        ConfigurationError: if ``action_dims`` does not have one entry in ``[1, action_dim]`` per task.
    """

    action_mask: Tensor

    def __init__(self, num_tasks: int, task_dim: int, action_dims: Sequence[int], action_dim: int) -> None:
        super().__init__()
        if len(action_dims) != num_tasks or not all(1 <= d <= action_dim for d in action_dims):
            raise ConfigurationError(
                f"action_dims={list(action_dims)} must have one entry between 1 and {action_dim} for each of the "
                f"{num_tasks} tasks."
            )
        # max_norm is applied out of place in `forward`: nn.Embedding's own renormalises its weight in place, which
        # changes parameters in evaluation and breaks functional calls and torch.compile.
        self.embedding = nn.Embedding(num_tasks, task_dim)
        init_world_model_weights(self.embedding)
        mask = torch.zeros(num_tasks, action_dim)
        for task, dim in enumerate(action_dims):
            mask[task, :dim] = 1.0
        self.register_buffer("action_mask", mask, persistent=False)

    def forward(self, task: Tensor) -> Tensor:
        """Embeddings ``[..., E]`` of task indices, int64 ``[...]``."""
        vector = self.embedding(task)
        # The rescaling is outside the gradient, as in nn.Embedding, which differentiates the rescaled weight.
        rescaled = vector.detach() / vector.detach().norm(dim=-1, keepdim=True).clamp_min(1.0)
        return vector + (rescaled - vector.detach())

    def mask(self, task: Tensor) -> Tensor:
        """Mask ``[..., A]`` of ones on the action dimensions of each task."""
        return self.action_mask[task]
