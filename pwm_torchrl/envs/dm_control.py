"""A DeepMind Control environment as a sub-environment. Imports dm_control, so only the maker loads this module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dm_env
import numpy as np
from dm_control.rl import control

from pwm_torchrl.envs.batch import RawStep, SubEnv, chosen
from pwm_torchrl.envs.env_state import PhysicsState, load_attributes, load_random, save_attributes, save_random
from pwm_torchrl.errors import ConfigurationError

__all__ = ["DMControlSubEnv"]


class DMControlSubEnv(SubEnv):
    """One ``dm_control.rl.control.Environment``.

    Args:
        name (str): label for messages.
        env (control.Environment): the environment.
        action_repeat (int): environment steps per agent step.
        episode_length (int, optional): agent steps after which to truncate.
        index (int): position in the batch.
        frame_size (tuple of int): height and width of rendered frames. Defaults to ``(256, 256)``.
        keys (sequence of str, optional): entries of the observation to use, in order. Defaults to ``None``, all of
            them.
    """

    def __init__(
        self,
        name: str,
        env: control.Environment,
        action_repeat: int,
        episode_length: int | None,
        index: int,
        frame_size: tuple[int, int] = (256, 256),
        keys: Sequence[str] | None = None,
    ) -> None:
        self._keys = chosen(name, _vector_keys(name, env), keys)
        self.simulator = env
        self._physics = PhysicsState(env.physics.model.ptr)
        self._frame_size = frame_size
        spec = env.action_spec()
        super().__init__(
            name,
            sum(self._keys.values()),
            np.broadcast_to(spec.minimum, spec.shape),
            np.broadcast_to(spec.maximum, spec.shape),
            action_repeat,
            episode_length,
            index,
        )

    def own_episode_length(self) -> int | None:
        """The task's time limit in agent steps."""
        limit = self.simulator._step_limit
        return None if math.isinf(limit) else math.ceil(limit / self.action_repeat)

    def terminates(self) -> bool:
        """Whether the task can end an episode before its time limit."""
        return type(self.simulator.task).get_termination is not control.Task.get_termination

    def _raw_reset(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            self.simulator.task._random = np.random.RandomState(seed)
        return self._flat(self.simulator.reset().observation)

    def _raw_step(self, action: np.ndarray) -> RawStep:
        step = self.simulator.step(action)
        last = step.step_type == dm_env.StepType.LAST
        # dm_env's convention: the last step of a truncated episode has discount 1.
        terminated = bool(last and step.discount < 1.0)
        return self._flat(step.observation), float(step.reward), terminated, last and not terminated

    def _flat(self, observation: Any) -> np.ndarray:
        """Concatenated entries in the order of the specification, as a new float32 array."""
        return np.concatenate([np.asarray(observation[key], np.float32).ravel() for key in self._keys])

    def save_simulator(self) -> dict[str, Any]:
        env = self.simulator
        return {
            "task": save_attributes(env.task),
            "random": save_random(env.task.random),
            "step_count": env._step_count,
            "reset_next_step": env._reset_next_step,
            "physics": self._physics.save(env.physics.model.ptr, env.physics.data.ptr),
        }

    def load_simulator(self, state: dict[str, Any]) -> None:
        env = self.simulator
        load_attributes(env.task, state["task"])
        load_random(env.task.random, state["random"])
        env._step_count = state["step_count"]
        env._reset_next_step = state["reset_next_step"]
        self._physics.load(env.physics.model.ptr, env.physics.data.ptr, state["physics"])

    def draw(self) -> np.ndarray:
        height, width = self._frame_size
        return self.simulator.physics.render(height, width, camera_id=0)

    def close(self) -> None:
        self.simulator.close()


def _vector_keys(name: str, env: control.Environment) -> dict[str, int]:
    """Length of each entry of the observation, in the order of the specification."""
    lengths = {}
    for key, spec in env.observation_spec().items():
        if len(spec.shape) >= 2 and (spec.dtype == np.uint8 or len(spec.shape) >= 3):
            raise ConfigurationError(
                f"{name} observes images of shape {spec.shape} ({key}): only vectors of numbers are supported"
            )
        lengths[key] = math.prod(spec.shape)
    return lengths
