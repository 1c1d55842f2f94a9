"""The latent world model: encoder, dynamics, reward and termination heads, task conditioning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pwm_torchrl.modules.dynamics import Dynamics
from pwm_torchrl.modules.encoder import Encoder
from pwm_torchrl.modules.heads import RewardHead, TerminationHead
from pwm_torchrl.modules.layers import init_world_model_weights
from pwm_torchrl.modules.statistics import RunningStatistics
from pwm_torchrl.modules.task import TaskEmbedding


class WorldModel(nn.Module):
    """Latent world model of PWM and TD-MPC2 (https://arxiv.org/abs/2407.02466, https://arxiv.org/abs/2310.16828).

    Shapes: observation ``[..., O]``, action ``[..., A]`` in [−1, 1], latent ``[..., D]``, task int64 with leading
    dimensions that broadcast against the others'. Knows nothing of TensorDict;
    see :mod:`pwm_torchrl.modules.tensordict_modules` for the wrapped parts.

    Args:
        encoder (Encoder): h(o, e) -> z.
        dynamics (Dynamics): d(z, a, e) -> z'.
        reward (RewardHead): R(z, a, e) -> logits.
        termination (TerminationHead, optional): for environments that terminate.
        task (TaskEmbedding, optional): for multi-task models.
        observation_statistics (RunningStatistics, optional): normalises observations in front of the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        dynamics: Dynamics,
        reward: RewardHead,
        termination: TerminationHead | None = None,
        task: TaskEmbedding | None = None,
        observation_statistics: RunningStatistics | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dynamics = dynamics
        self.reward = reward
        self.termination = termination
        self.task = task
        self.observation_statistics = observation_statistics

    def reset_parameters(self) -> None:
        """Initialise every network anew; statistics of observations stay."""
        self.apply(init_world_model_weights)
        self.reward.reset_parameters()

    def embed(self, task: Tensor | None) -> Tensor | None:
        """Task embedding ``[..., E]``; ``None`` for a single-task model.

        Raises:
            ValueError: if a multi-task model gets no task, or a single-task model gets one.
        """
        if (self.task is None) != (task is None):
            raise ValueError(
                "This world model is multi-task and needs a task index."
                if task is None
                else "This world model is single-task and takes no task index."
            )
        return None if self.task is None else self.task(task)

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Zero the padding dimensions of ``action`` for each task; the identity without tasks."""
        return action if self.task is None or task is None else action * self.task.mask(task)

    def encode(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent ``[..., D]``."""
        if self.observation_statistics is not None:
            observation = self.observation_statistics.normalize(observation)
        return self.encoder(observation, self.embed(task))

    def predict(
        self, latent: Tensor, action: Tensor, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What training needs of one transition; the action is masked by the task.

        Returns:
            tuple: next latent ``[..., D]``, reward logits ``[..., bins]``, termination logit ``[..., 1]`` or ``None``.
        """
        embedding = self.embed(task)
        action = self.mask_action(action, task)
        next_latent = self.dynamics(latent, action, embedding)
        logits = self.reward(latent, action, embedding)
        termination = None if self.termination is None else self.termination(next_latent, embedding)
        return next_latent, logits, termination

    def forward(self, latent: Tensor, action: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One imagined step: next latent ``[..., D]``, decoded reward ``[..., 1]``, terminated bool ``[..., 1]``."""
        next_latent, logits, termination = self.predict(latent, action, task)
        reward = self.reward.decode(logits)
        if self.termination is None or termination is None:
            terminated = torch.zeros_like(reward, dtype=torch.bool)
        else:
            terminated = self.termination.terminated(termination)
        return next_latent, reward, terminated
