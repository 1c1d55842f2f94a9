"""What batched simulations have in common: their specs and facts, the end of a step, names of tasks, random numbers.

dflex and the differentiable simulators step all their environments at once. dflex keeps the state to itself, the others
are given it; what is here serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from pwm_torchrl.envs.standard import EnvInfo, check_maker_arguments
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, nearest

__all__ = ["RandomStream", "SimulatedEnv", "check_simulation", "message_of"]


class SimulatedEnv(EnvBase):
    """N simulations that are stepped together, a TorchRL environment of batch size ``[N]``.

    A subclass keeps the seed in ``_seed``, for messages.

    Args:
        info (EnvInfo): its facts; ``pwm_info`` of the environment.
        device (torch.device or str): where it simulates.
    """

    def __init__(self, info: EnvInfo, device: torch.device | str) -> None:
        n, o, a = info.num_envs, info.observation_dim, info.action_dim
        super().__init__(device=torch.device(device), batch_size=torch.Size([n]))
        self.pwm_info = info
        self.observation_spec = Composite(
            observation=Unbounded((n, o), dtype=torch.float32, device=self.device), shape=[n]
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, a), dtype=torch.float32, device=self.device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=self.device)
        flag = Categorical(2, dtype=torch.bool, shape=(n, 1), device=self.device)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=[n])
        self._set_seed(info.seed)

    def stepped(self, observation: Tensor, reward: Tensor, terminated: Tensor, truncated: Tensor) -> TensorDict:
        """What a step returns: ``observation`` ``[N, O]``, and ``[N, 1]`` of the others.

        Raises:
            EnvironmentFault: if an observation or a reward is not finite.
        """
        self.check_finite(observation, "observation")
        self.check_finite(reward, "reward")
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return TensorDict(
            {"observation": observation, "reward": reward, **flags}, batch_size=self.batch_size, device=self.device
        )

    def began(self, observation: Tensor) -> TensorDict:
        """What a reset returns: ``observation`` ``[N, O]``.

        Raises:
            EnvironmentFault: if an observation is not finite.
        """
        self.check_finite(observation, "observation after reset")
        return TensorDict({"observation": observation}, batch_size=self.batch_size, device=self.device)

    def check_finite(self, values: Tensor, what: str) -> None:
        """Raise EnvironmentFault for the first row of ``values`` ``[N, ...]`` that is not finite."""
        bad = ~torch.isfinite(values).flatten(1).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise EnvironmentFault(self.pwm_info.name, f"{what} is not finite", seed=self._seed, index=row)


class RandomStream:
    """A separate state of torch's and numpy's global generators, used while a simulator runs.

    dflex and rewarped draw from the global generators; without a separate state, an evaluation would change the
    training run.

    Args:
        device (torch.device): of the simulator; a GPU has a generator of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._get()

    def seed(self, seed: int) -> None:
        """Reseed the stream."""
        outside = self._get()
        # Not torch.manual_seed, which seeds every GPU: a simulator on the CPU would reseed training on one.
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            with torch.cuda.device(self._cuda):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        self._state = self._get()
        self._set(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use this stream inside the block."""
        outside = self._get()
        self._set(self._state)
        try:
            yield
        finally:
            self._state = self._get()
            self._set(outside)

    def _get(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda else None
        return torch.get_rng_state(), np.random.get_state(), cuda

    def _set(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        if self._cuda:
            torch.cuda.set_rng_state(state[2], self._cuda)


def check_simulation(name: str, library: str, tasks: Iterable[str], num_envs: int, episode_length: int) -> str:
    """The task that ``env.name`` stands for, which may begin with ``library`` and an underscore.

    Args:
        name (str): of the configuration.
        library (str): ``"dflex"`` or ``"rewarped"``.
        tasks (iterable of str): those that it has.
        num_envs (int): of the configuration.
        episode_length (int): of the configuration.

    Raises:
        ConfigurationError: for an unknown name, or a number that is not a positive integer.
    """
    check_maker_arguments(num_envs, 1, episode_length)
    task = str(name).removeprefix(f"{library}_")
    if task not in tasks:
        near = nearest(task, tasks)
        raise ConfigurationError(
            f"env.name={name!r} is not a {library} simulation: "
            + (f"did you mean {near}?" if near else f"choose {', '.join(tasks)}")
        )
    return task


def message_of(error: BaseException) -> str:
    """Type and message of an error in one line of at most about 300 characters."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}"
