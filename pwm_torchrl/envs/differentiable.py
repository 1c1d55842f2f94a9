"""Batched simulations, and differentiable simulators.

The first part is shared by dflex and the differentiable simulators: specs and facts, the results of a step, task names,
random numbers. A :class:`Simulator` is a function of an explicit state, so that gradients can flow back through its
steps, a batch can be split into micro-batches, an update can be repeated, and checkpoints are complete. A simulator
with internal state can be wrapped by writing and reading the state at every step, as ``rewarped.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, PendulumEnv

from pwm_torchrl.envs.standard import EnvInfo, check_maker_arguments
from pwm_torchrl.errors import ConfigurationError, DivergenceError, EnvironmentFault, nearest

__all__ = [
    "DifferentiableEnv",
    "PendulumSimulator",
    "RandomStream",
    "RunningEpisodes",
    "SimulatedEnv",
    "Simulator",
    "check_simulation",
    "make_torchrl_pendulum",
    "message_of",
]

# Shared by batched simulations ----------------------------------------------------------------------------------------


class SimulatedEnv(EnvBase):
    """N simulations that are stepped together, as a TorchRL environment of batch size ``[N]``.

    A subclass stores the seed in ``_seed``, for messages.

    Args:
        info (EnvInfo): facts of the environment, stored as ``pwm_info``.
        device (torch.device or str): device of the simulation.
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
        """The result of a step, from ``observation`` ``[N, O]`` and the others ``[N, 1]``.

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
        """The result of a reset, from ``observation`` ``[N, O]``.

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
        device (torch.device): device of the simulator; a GPU has its own generator.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._get()

    def seed(self, seed: int) -> None:
        """Reseed the stream."""
        outside = self._get()
        # Not torch.manual_seed, which seeds every GPU: a simulator on the CPU would reseed training on a GPU.
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
    """The task that ``env.name`` refers to, optionally with the prefix ``<library>_``.

    Args:
        name (str): ``env.name``.
        library (str): ``"dflex"`` or ``"rewarped"``.
        tasks (iterable of str): the library's tasks.
        num_envs (int): ``env.num_envs``.
        episode_length (int): ``env.episode_length``.

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


# Differentiable simulators: their interface, an environment, the episodes of training, TorchRL's pendulum -------------


class Simulator(Protocol):
    """Equations of motion that autograd can differentiate.

    Attributes:
        state_dim (int): ``S``, length of the complete state.
        observation_dim (int): ``O``.
        action_dim (int): ``A``.
        action_low (tuple of float): smallest action in the simulator's own units, which is scaled to -1.
        action_high (tuple of float): largest action, which is scaled to 1.
        terminates (bool): whether a step can end an episode.
    """

    state_dim: int
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    terminates: bool

    def reset(self, count: int, generator: torch.Generator) -> Tensor:
        """States ``[count, S]`` float32 of new episodes, drawn from ``generator`` and on its device."""

    def observe(self, state: Tensor) -> Tensor:
        """Observations ``[..., O]`` of states ``[..., S]``, differentiable."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiable step of independent rows, without side effects.

        Args:
            state (Tensor): ``[B, S]``. B is ``num_envs``, or less if the batch is split to save memory.
            action (Tensor): ``[B, A]`` in [-1, 1].

        Returns:
            tuple: next states ``[B, S]``, rewards ``[B, 1]``, and whether an episode terminated, bool ``[B, 1]``;
            terminated rows are not reset here.
        """


class DifferentiableEnv(SimulatedEnv):
    """A simulator as an ordinary TorchRL environment of N episodes, which steps without gradients.

    ``algorithm=shac`` takes the simulator from it and steps that with gradients. A custom maker can return such an
    environment to be trained with it.

    Args:
        simulator (Simulator): the equations of motion.

    Keyword Args:
        name (str): label for tables and messages.
        num_envs (int): ``N``.
        episode_length (int): agent steps after which an episode is truncated.
        seed (int): seed of the initial states of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulation. Defaults to ``"cpu"``.
    """

    state_support = "exact: simulator states, clocks and random generator"

    def __init__(
        self,
        simulator: Simulator,
        *,
        name: str,
        num_envs: int,
        episode_length: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            EnvInfo(
                name=name,
                observation_dim=simulator.observation_dim,
                action_dim=simulator.action_dim,
                episode_length=episode_length,
                action_repeat=1,
                num_envs=num_envs,
                terminates=simulator.terminates,
                seed=seed,
                action_low=simulator.action_low,
                action_high=simulator.action_high,
                simulator=simulator,
            ),
            device,
        )
        self.simulator = simulator
        self._state = torch.zeros(num_envs, simulator.state_dim, device=self.device)
        self._age = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed = seed
            self._generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action").detach().clamp(-1.0, 1.0)
        self._state, reward, terminated = self.simulator.step(self._state, action)
        self._age = self._age + 1
        truncated = (self._age >= self.pwm_info.episode_length).unsqueeze(-1)
        return self.stepped(self.simulator.observe(self._state), reward, terminated, truncated)

    @torch.no_grad()
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = torch.ones_like(self._age, dtype=torch.bool) if mask is None else mask.view(-1)
        fresh = self.simulator.reset(len(rows), self._generator)
        self._state = torch.where(rows.unsqueeze(-1), fresh, self._state)
        self._age = self._age.masked_fill(rows, 0)
        return self.began(self.simulator.observe(self._state))

    def save_state(self) -> dict[str, Any]:
        """Simulator states, clocks and random generator."""
        return {"state": self._state.clone(), "age": self._age.clone(), "generator": self._generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save_state`."""
        _check_rows(len(state["age"]), len(self._age))
        self._state, self._age = state["state"].to(self.device), state["age"].to(self.device)
        self._generator.set_state(state["generator"].cpu())

    def render_frame(self) -> np.ndarray:
        """A frame of the first state from the simulator's ``draw(state)``; raises ConfigurationError without one."""
        draw = getattr(self.simulator, "draw", None)
        if draw is None:
            raise ConfigurationError(f"{self.pwm_info.name} cannot be filmed: its simulator draws no pictures")
        frame: np.ndarray = draw(self._state[0])
        return frame


class RunningEpisodes:
    """Running episodes of a differentiable simulator, which training advances by whole rollouts.

    Episodes start at random ages, so that they do not all end at once. An episode ends with the rollout in which it
    reaches its length; rewards beyond the length do not count towards its return.

    Args:
        simulator (Simulator): the equations of motion.
        info (EnvInfo): number and length of episodes.
        device (torch.device): device of the states.

    Attributes:
        states (Tensor): start states of the next rollouts, ``[N, S]``.
    """

    def __init__(self, simulator: Simulator, info: EnvInfo, device: torch.device) -> None:
        if info.episode_length is None:
            raise ConfigurationError(f"{info.name} has episodes without end; set env.episode_length")
        self.simulator, self.info, self.device = simulator, info, device
        self.length = info.episode_length
        self._generator = torch.Generator(device).manual_seed(info.seed)
        self.states = simulator.reset(info.num_envs, self._generator)
        self._age = torch.randint(self.length, (info.num_envs,), generator=self._generator, device=device)
        self._whole = torch.zeros(info.num_envs, dtype=torch.bool, device=device)  # observed from the start
        self._returns = torch.zeros(info.num_envs, dtype=torch.float64, device=device)
        self._finished: list[Tensor] = []

    @torch.no_grad()
    def advance(self, state: Tensor, action: Tensor, reward: Tensor, terminated: Tensor) -> None:
        """Move the episodes to the end of a rollout of H steps.

        Args:
            state (Tensor): states before its last step ``[N, S]``.
            action (Tensor): actions of its last step ``[N, A]``.
            reward (Tensor): ``[N, H]``.
            terminated (Tensor): bool ``[N, H]``.

        Raises:
            DivergenceError: if a state or reward is not finite, since its gradient has already reached the policy.
        """
        following, _, _ = self.simulator.step(state, action)
        if not (torch.isfinite(following).all() and torch.isfinite(reward).all()):
            raise DivergenceError(
                f"environment {self.info.name}: a state or reward of a rollout is not finite; the last checkpoint is "
                "from an earlier step. Lower algorithm.actor_lr or algorithm.horizon."
            )
        steps = torch.arange(reward.shape[1], device=self.device)
        going = torch.cat([torch.zeros_like(terminated[:, :1]), terminated[:, :-1]], 1).cumsum(1) == 0
        counted = going & (self._age.unsqueeze(1) + steps < self.length)
        self._returns += (reward.double() * counted).sum(1)
        self._age += len(steps)
        over = terminated.any(1) | (self._age >= self.length)
        self._finished.append(self._returns[over & self._whole])
        fresh = self.simulator.reset(len(over), self._generator)
        self.states = torch.where(over.unsqueeze(-1), fresh, following)
        self._age = self._age.masked_fill(over, 0)
        self._returns = self._returns.masked_fill(over, 0.0)
        self._whole = self._whole | over

    def pop_returns(self) -> Tensor:
        """Returns of the episodes that ended since the last call, float64 ``[E]``."""
        finished = torch.cat([self._returns.new_zeros(0), *self._finished])
        self._finished = []
        return finished

    def state_dict(self) -> dict[str, Any]:
        """The complete state of the episodes."""
        return {
            "states": self.states,
            "age": self._age,
            "whole": self._whole,
            "returns": self._returns,
            "finished": torch.cat([self._returns.new_zeros(0), *self._finished]),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        _check_rows(len(state_dict["age"]), self.info.num_envs)
        self.states = state_dict["states"].to(self.device).clone()
        self._age, self._whole = state_dict["age"].to(self.device).clone(), state_dict["whole"].to(self.device).clone()
        self._returns = state_dict["returns"].to(self.device).clone()
        self._finished = [state_dict["finished"].to(self.device).clone()]
        self._generator.set_state(state_dict["generator"].cpu())


def _check_rows(saved: int, here: int) -> None:
    if saved != here:
        raise ConfigurationError(f"the saved state has {saved} environments and this run {here} (env.num_envs)")


class PendulumSimulator:
    """TorchRL's stateless :class:`~torchrl.envs.PendulumEnv`: swing up and balance.

    The state, which is also the observation, contains cosine and sine of the angle, and the angular velocity divided by
    its maximum. Unlike the angle, it is continuous where the angle wraps.
    """

    state_dim = observation_dim = 3
    action_dim = 1
    terminates = False

    def __init__(self) -> None:
        self.env = PendulumEnv()
        params = PendulumEnv.gen_params()["params"]
        self.max_speed, torque = params["max_speed"].item(), params["max_torque"].item()
        self.action_low: tuple[float, ...] = (-torque,)
        self.action_high: tuple[float, ...] = (torque,)

    def reset(self, count: int, generator: torch.Generator) -> Tensor:
        """PendulumEnv's initial states: any angle, angular velocity from -1 to 1."""
        draws = 2 * torch.rand(count, 2, generator=generator, device=generator.device) - 1
        return self._state(PendulumEnv.DEFAULT_X * draws[:, 0], PendulumEnv.DEFAULT_Y * draws[:, 1])

    def observe(self, state: Tensor) -> Tensor:
        """The state itself."""
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """PendulumEnv's step; it never terminates."""
        batch, device = [len(state)], state.device
        data = PendulumEnv.gen_params(batch_size=batch, device=device)
        data["th"], data["thdot"] = torch.atan2(state[:, 1], state[:, 0]), self.max_speed * state[:, 2]
        data["action"] = self.action_high[0] * action
        following = self.env.step(data)["next"]
        return self._state(following["th"], following["thdot"]), following["reward"], following["terminated"]

    def _state(self, angle: Tensor, speed: Tensor) -> Tensor:
        return torch.stack([angle.cos(), angle.sin(), speed / self.max_speed], -1)


def make_torchrl_pendulum(
    num_envs: int = 64, seed: int = 0, device: torch.device | str = "cpu", episode_length: int = 200
) -> DifferentiableEnv:
    """TorchRL's pendulum, which ``algorithm=shac`` can differentiate.

    Args:
        num_envs (int): ``N``. Defaults to ``64``.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulation. Defaults to ``"cpu"``.
        episode_length (int): agent steps per episode. Defaults to ``200``.

    Returns:
        DifferentiableEnv: ``observation`` float32 ``[N, 3]``, ``action`` float32 ``[N, 1]`` in [-1, 1].

    Examples:
        >>> from pwm_torchrl.envs import make_torchrl_pendulum
        >>> make_torchrl_pendulum(num_envs=2).rollout(3)["next", "reward"].shape
        torch.Size([2, 3, 1])
    """
    check_maker_arguments(num_envs, 1, episode_length)
    return DifferentiableEnv(
        PendulumSimulator(),
        name="pendulum_torchrl",
        num_envs=num_envs,
        episode_length=episode_length,
        seed=seed,
        device=device,
    )
