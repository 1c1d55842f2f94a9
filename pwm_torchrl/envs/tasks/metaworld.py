"""A Meta-World environment as a sub-environment. Imports gymnasium, so only the maker loads this module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pwm_torchrl.envs.batch import RawStep, SubEnv
from pwm_torchrl.envs.env_state import PhysicsState, load_attributes, load_random, save_attributes, save_random
from pwm_torchrl.envs.gym import PRESENTATION, instability_warnings
from pwm_torchrl.errors import ConfigurationError

__all__ = ["MetaWorldSubEnv"]

_CAMERA, _CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)  # closer to the table than Meta-World's own
_PICTURE = 256


class MetaWorldSubEnv(SubEnv):
    """One Meta-World task with an observable goal; every episode randomises objects and goal.

    Args:
        name (str): label for messages.
        make (callable): the class of the environment.
        action_repeat (int): environment steps per agent step.
        episode_length (int): agent steps after which to truncate.
        index (int): position in the batch.
        render (bool): whether it will be rendered.
    """

    def __init__(
        self, name: str, make: Callable[..., Any], action_repeat: int, episode_length: int, index: int, render: bool
    ) -> None:
        env = make(render_mode="rgb_array", camera_name=_CAMERA, width=_PICTURE, height=_PICTURE) if render else make()
        # Meta-World's benchmarks set these through a list of fixed goals. Its classes with an observable goal would
        # work, too, but their constructors draw from numpy's global generator and change the model.
        env._partially_observable = False
        del env.sawyer_observation_space  # cached for a hidden goal
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        env.max_path_length = float("inf")  # our own limit counts agent steps
        env.model.camera(_CAMERA).pos = _CAMERA_POSITION
        self.simulator = env
        self._rendered = render
        self._physics = PhysicsState(env.model)
        self._unstable = instability_warnings()
        self._has_reset = False
        space = env.action_space
        observation_dim = env.sawyer_observation_space.shape[0]
        super().__init__(name, observation_dim, space.low, space.high, action_repeat, episode_length, index)
        self.success = False

    def _raw_reset(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            self.simulator.seed(seed)
        self._has_reset = True
        self.simulator.reset()
        return self._raw_step(np.zeros(self.action_space.shape))[0]

    def _raw_step(self, action: np.ndarray) -> RawStep:
        observation, reward, _, _, info = self.simulator.step(action.astype(np.float32))
        if self.simulator.data.warning.number[self._unstable].any():
            raise FloatingPointError("the simulation became unstable (MuJoCo: bad position, velocity or acceleration)")
        self.success = bool(info["success"])
        return np.asarray(observation, np.float32), float(reward), False, False

    def save_simulator(self) -> dict[str, Any]:
        env = self.simulator
        return {
            "attributes": save_attributes(env, skip=(*PRESENTATION, *self._windows())),
            "random": save_random(env.np_random),
            "success": self.success,
            "physics": self._physics.save(env.model, env.data),
        }

    def load_simulator(self, state: dict[str, Any]) -> None:
        env = self.simulator
        if not self._has_reset:  # the first reset creates the views of the physics, see _windows
            env.reset()
            self._has_reset = True
        load_attributes(env, state["attributes"])
        load_random(env.np_random, state["random"])
        self.success = state["success"]
        self._physics.load(env.model, env.data, state["physics"])

    def _windows(self) -> list[str]:
        """Attributes that are views of the physics' data, which loading must not replace by copies."""
        env = self.simulator
        arrays = {name: value for name, value in vars(env).items() if isinstance(value, np.ndarray)}
        return [name for name, value in arrays.items() if self._physics.shares_memory(env.data, value)]

    def draw(self) -> np.ndarray:
        if not self._rendered:
            raise ConfigurationError(f"{self.name} was made without render=True")
        return self.simulator.render()[::-1, ::-1]  # the camera hangs upside down

    def close(self) -> None:
        self.simulator.close()
