"""Where imagined rollouts start: replayed observations, given states, or whatever a function draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, ReplayBuffer, Unbounded

from pwm_torchrl.envs.latent_model import LatentModel
from pwm_torchrl.errors import ConfigurationError

__all__ = ["Start", "StartStates"]


@runtime_checkable
class Observations(Protocol):
    """A replay of ours: :class:`~pwm_torchrl.data.TrajectoryReplay`."""

    def sample_observations(self, count: int) -> Tensor: ...


Start: TypeAlias = "Tensor | TensorDictBase | Observations | ReplayBuffer | Callable[[int], Tensor | TensorDictBase]"


class StartStates:
    """Draws start states, without gradient.

    Args:
        start (Start, optional): see :class:`~pwm_torchrl.envs.LatentImaginationEnv`.
        model (LatentModel): its encoder makes states of observations.
        task (int, optional): index of the task of all of them. Defaults to ``None``: it comes with the start.
    """

    def __init__(self, start: Start | None, model: LatentModel, task: int | None = None) -> None:
        self.start = start
        self.model = model
        self.task = task
        self.generator = torch.Generator()
        known = (Tensor, TensorDictBase, Observations, ReplayBuffer)
        if start is not None and not isinstance(start, known) and not callable(start):
            raise ConfigurationError(
                f"start is a {type(start).__name__}: latents, a TensorDict of them, a replay or a function of the "
                "number of states is needed."
            )

    def draw(self, count: int, device: torch.device) -> TensorDictBase:
        """States ``[count]``: the model's state entries and, for a model of several tasks, the task.

        Raises:
            ConfigurationError: if there is no start, or it lacks something.
        """
        drawn = self._draw(count)
        if isinstance(drawn, Tensor):
            drawn = TensorDict({self.model.states[0]: drawn}, batch_size=drawn.shape[:1])
        if drawn.shape != (count,):
            raise ConfigurationError(f"start gave states of batch size {list(drawn.shape)} instead of [{count}].")
        with torch.no_grad():
            return self.complete(drawn.to(device)).detach()

    def spec(self, device: torch.device) -> Composite:
        """Spec of a state, from one that is drawn."""
        drawn = self.draw(1, device)
        entries = {key: drawn.get(key) for key in self.model.states}
        return Composite({key: Unbounded(value.shape[1:], dtype=value.dtype) for key, value in entries.items()})

    def complete(self, drawn: TensorDictBase) -> TensorDictBase:
        """The entries of a state, of observations encoded unless there are states already, in a TensorDict of its own.

        Raises:
            ConfigurationError: if entries are missing.
        """
        states, task = list(self.model.states), self.model.task
        if task is not None and self.task is not None:
            drawn = drawn.copy().set(task, torch.full(drawn.batch_size, self.task, device=drawn.device))
        if task is not None and drawn.get(task, None) is None:
            raise ConfigurationError(
                f"world_model has several tasks and the start tells none: put {task!r} beside the states, or name one "
                "task for all by task=."
            )
        encoder = self.model.encoder
        missing = [key for key in states if drawn.get(key, None) is None]
        if missing and encoder is not None and all(drawn.get(key, None) is not None for key in encoder.in_keys):
            drawn = encoder(drawn.copy())
            missing = [key for key in states if drawn.get(key, None) is None]
        if missing:
            reads = [] if encoder is None else encoder.in_keys
            raise ConfigurationError(
                f"start holds {sorted(map(str, drawn.keys(True, True)))} and lacks {missing}: states {states} are "
                f"needed, or what the encoder makes them of, {reads}."
            )
        return drawn.select(*states, *([] if task is None else [task]))

    def _draw(self, count: int) -> Tensor | TensorDictBase:
        start = self.start
        if start is None:
            raise ConfigurationError(
                "start=None draws no states: give the environment a start, or reset it with the states themselves, "
                "env.reset(states, set_state=True)."
            )
        if isinstance(start, (Tensor, TensorDictBase)):
            rows = torch.randint(len(start), (count,), generator=self.generator)
            return start[rows.to(start.device or "cpu")]
        if isinstance(start, Observations):
            observations = start.sample_observations(count)
            if self.model.encoder is None:
                raise ConfigurationError("start is a replay of observations, and this world_model has no encoder.")
            return TensorDict({self.model.encoder.in_keys[0]: observations}, batch_size=[count])
        if isinstance(start, ReplayBuffer):
            return start.sample(count).reshape(-1)
        return start(count)
