"""A world model, ours or TorchRL's, as the transition of an environment: what it reads, writes and encodes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.modules import WorldModel as TorchRLWorldModel

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModel, encoder_module, world_model_module
from pwm_torchrl.objectives.base import check_shape

__all__ = ["LatentModel"]

REWARD, TERMINATED, DONE = ("next", "reward"), ("next", "terminated"), ("next", "done")


@dataclass(frozen=True)
class LatentModel:
    """What an environment needs of a world model.

    Attributes:
        step: one transition, from a state and an action to everything under ``"next"``.
        encoder: observations to states; ``None`` if the model has none.
        states: entries that make up the state, each of which ``step`` also writes under ``"next"``.
        action: entry of the action.
        task: entry of the task index; ``None`` for a model without tasks.
        ended: entry that tells termination; ``None`` for a model that writes none.
        terminates: whether that is ever true.
    """

    step: TensorDictModuleBase
    encoder: TensorDictModuleBase | None
    states: tuple[NestedKey, ...]
    action: NestedKey
    task: NestedKey | None
    ended: tuple[str, str] | None
    terminates: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        observation: NestedKey = "observation",
        latent: NestedKey = "latent",
        action: NestedKey = "action",
        task: NestedKey = "task",
    ) -> LatentModel:
        """Wrap a world model; the keys of ours are free, those of others are read from them.

        Args:
            model (nn.Module): a :class:`~pwm_torchrl.modules.WorldModel`, a TorchRL
                :class:`~torchrl.modules.WorldModel`, or a TensorDictModule of one step.

        Keyword Args:
            observation (NestedKey): what our encoder reads. Defaults to ``"observation"``.
            latent (NestedKey): the state of our model. Defaults to ``"latent"``.
            action (NestedKey): action, of any model. Defaults to ``"action"``.
            task (NestedKey): task index, of any model that reads one. Defaults to ``"task"``.

        Raises:
            ConfigurationError: if it is none of these, or reads and writes what an environment cannot give.
        """
        if isinstance(model, WorldModel):
            key = None if model.task is None else task
            step = world_model_module(
                model, latent=latent, action=action, next_latent=unravel_key(("next", latent)), task=key
            )
            encoder = encoder_module(model, observation=observation, latent=latent, task=key)
            terminates = model.termination is not None
            return cls(step, encoder, (unravel_key(latent),), unravel_key(action), key, TERMINATED, terminates)
        if isinstance(model, TorchRLWorldModel):
            return cls._foreign(model.step_module, model.encoder, action, task)
        if isinstance(model, TensorDictModuleBase):
            return cls._foreign(model, None, action, task)
        raise ConfigurationError(
            f"world_model is a {type(model).__name__}: pwm_torchrl's WorldModel, TorchRL's WorldModel, or a "
            "TensorDictModule of one step is needed."
        )

    @classmethod
    def _foreign(
        cls, step: TensorDictModuleBase, encoder: TensorDictModuleBase | None, action: NestedKey, task: NestedKey
    ) -> LatentModel:
        reads = [unravel_key(key) for key in step.in_keys]
        writes = [unravel_key(key) for key in step.out_keys]
        action, task = unravel_key(action), unravel_key(task)
        states = tuple(key for key in reads if unravel_key(("next", key)) in writes)
        others = [key for key in reads if key not in states and key not in (action, task)]
        if not states or others or action not in reads or REWARD not in writes:
            raise ConfigurationError(
                f"world_model reads {reads} and writes {writes}: its step must read a state that it also writes under "
                f"'next', the action {action!r}, at most the task {task!r} beside them, and write {REWARD}."
            )
        ended = next((key for key in (TERMINATED, DONE) if key in writes), None)
        return cls(step, encoder, states, action, task if task in reads else None, ended, ended is not None)

    def predict(self, inputs: TensorDictBase) -> TensorDictBase:
        """What one step writes under ``"next"``, from the state, action and task in ``inputs``, which stay as they are.

        Returns:
            TensorDictBase: the state's entries, ``"reward"`` ``[..., 1]`` and boolean ``"terminated"`` ``[..., 1]``.

        Raises:
            ValueError: if reward or termination have another shape, or termination is not boolean.
        """
        read = [*self.states, self.action, *([] if self.task is None else [self.task])]
        following = self.step(inputs.select(*read)).get("next")
        shape = (*inputs.batch_size, 1)
        reward = following.get("reward")
        check_shape("reward of the world_model", reward, shape)
        if self.ended is None:
            terminated = torch.zeros_like(reward, dtype=torch.bool)
        else:
            terminated = following.get(self.ended[1:])
            check_shape("termination of the world_model", terminated, shape)
        if terminated.dtype != torch.bool:
            raise ConfigurationError(
                f"world_model writes {self.ended} as {terminated.dtype}, which is no decision: torch.bool is needed."
            )
        return following.select(*self.states).update({"reward": reward, "terminated": terminated})
