"""Gradients of a policy loss, a micro-batch of rollouts at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor

from pwm_torchrl.objectives.base import micro_batches
from pwm_torchrl.objectives.imagination import Imagined
from pwm_torchrl.objectives.rollouts import ImaginedTargets


class Accumulated(NamedTuple):
    """What the micro-batches of a policy update add up to, before its gradients are divided."""

    gradients: list[Tensor | None]  # of −mean(J), by parameter; None for those that J does not depend on
    returns: Tensor  # J [B, 1]
    rollouts: TensorDictBase  # [B, H], detached


class PolicyUpdates(ImaginedTargets):
    """A loss −J of imagined rollouts whose gradients add up over shares of a batch.

    Arguments as :class:`~pwm_torchrl.objectives.rollouts.ImaginedTargets`'s; subclasses say how rollouts come about.
    """

    actor_network_params: TensorDictParams

    def start(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """Start latents ``[B, D]`` and, for multi-task models, tasks ``[B]``."""
        raise NotImplementedError

    def draw_noise(self, latent: Tensor) -> Tensor | None:
        """Action noise ``[H, B, A]`` for start latents ``[B, D]``."""
        raise NotImplementedError

    def imagine(
        self, start: Tensor, task: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Imagined, Tensor]:
        """Differentiable rollout and its values ``[H, B, 1]``."""
        raise NotImplementedError

    def returns(self, rollout: Imagined, next_value: Tensor) -> Tensor:
        """J ``[B, 1]`` of every rollout."""
        raise NotImplementedError

    def entropy_bonus(self, rollout: Imagined, noise: Tensor | None, task: Tensor | None = None) -> Tensor | float:
        """What is added to J ``[B, 1]`` for the sake of the policy's entropy."""
        raise NotImplementedError

    def divisor(self, returns: Tensor) -> Tensor | int:
        """What −J is divided by, once all of the batch's are known."""
        raise NotImplementedError

    def metrics(self, loss: Tensor, returns: Tensor, imagined: TensorDictBase) -> TensorDictBase:
        """What ``forward`` returns."""
        raise NotImplementedError

    def reduced(self, each: Tensor) -> Tensor:
        """``each`` ``[B, 1]`` as ``reduction`` says."""
        if self.reduction == "none":
            return each
        return each.mean() if self.reduction == "mean" else each.sum()

    def backward(
        self, tensordict: TensorDictBase, micro_batch: int | None = None
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Add the gradients of the loss to the actor's parameters, a micro-batch of rollouts at a time.

        The noise is drawn for the whole batch, and the gradients are divided by the running standard deviation once all
        its returns have entered it, so that the arithmetic is that of :meth:`rollout_and_loss` on the whole batch.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``, as :meth:`forward` takes them.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.

        Returns:
            tuple: what :meth:`rollout_and_loss` returns, all of it detached.

        Raises:
            ConfigurationError: for ``reduction="none"``.
        """
        return self.finish(self.accumulate(tensordict, micro_batch))

    def accumulate(
        self,
        tensordict: TensorDictBase,
        micro_batch: int | None = None,
        noise: Tensor | None = None,
        count: int | None = None,
    ) -> Accumulated:
        """The first half of :meth:`backward`: what adds up over shares of a batch; changes nothing.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``, or a share of a batch of them.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.
            noise (Tensor, optional): of these rollouts, as :meth:`draw_noise` draws it. Defaults to ``None``, drawn.
            count (int, optional): rollouts of the whole batch. Defaults to ``None``, B.
        """
        self.check_back_propagates()
        start, task = self.start(tensordict)
        noise = self.draw_noise(start) if noise is None else noise
        count = len(start) if count is None else count
        divisor = count if self.reduction == "mean" else 1
        parameters = self._trained()
        total: list[Tensor | None] = [None] * len(parameters)
        returns, imagined = [], []
        for rows in micro_batches(len(start), micro_batch):
            tasks = None if task is None else task[rows]
            drawn = None if noise is None else noise[:, rows]
            rollout, next_value = self.imagine(start[rows], tasks, drawn)
            part = self.returns(rollout, next_value)
            objective = part + self.entropy_bonus(rollout, drawn, tasks)
            gradients = torch.autograd.grad(-objective.sum() / divisor, parameters, allow_unused=True)
            # Not in place: autograd may hand out one tensor as the gradient of two parameters.
            total = [b if a is None else a + b for a, b in zip(total, gradients, strict=True)]
            returns.append(part.detach())
            imagined.append(self.detached(rollout, next_value))
            del rollout, next_value, part, objective, gradients  # or they would live beside the next part's
        return Accumulated(total, torch.cat(returns), imagined[0] if len(imagined) == 1 else torch.cat(imagined))

    def finish(self, whole: Accumulated) -> tuple[TensorDictBase, TensorDictBase]:
        """The second half of :meth:`backward`, with what the whole batch accumulated; returns what that returns."""
        divisor = self.divisor(whole.returns)
        for parameter, gradient in zip(self._trained(), whole.gradients, strict=True):
            if gradient is not None:
                gradient = gradient / divisor
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        loss = self.reduced(-whole.returns) / divisor
        return self.metrics(loss, whole.returns, whole.rollouts), whole.rollouts

    def _trained(self) -> list[Tensor]:
        return [p for p in self.actor_network_params.values(True, True) if p.requires_grad]
