"""Gymnasium and Meta-World environments as sub-environments. Imports gymnasium, so only the makers load this module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pwm_torchrl.envs.batch import RawStep, SubEnv, chosen
from pwm_torchrl.envs.env_state import PhysicsState, load_attributes, load_random, save_attributes, save_random
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "PRESENTATION",
    "GymnasiumSubEnv",
    "MetaWorldSubEnv",
    "instability_warnings",
]

#: Attributes for rendering, which are not part of the state.
PRESENTATION = (
    "render_mode",
    "screen",
    "clock",
    "isopen",
    "width",
    "height",
    "_np_random_seed",
    "_ezpickle_args",
    "_ezpickle_kwargs",
)


#: gymnasium's simulators whose episodes only end by the time limit.
_NEVER_TERMINATE = ("PendulumEnv", "HalfCheetahEnv", "SwimmerEnv", "ReacherEnv", "PusherEnv", "HumanoidStandupEnv")
#: gymnasium's wrappers that have no state, or only a counter, which is saved.
_PLAIN_WRAPPERS = ("TimeLimit", "OrderEnforcing", "PassiveEnvChecker")


class GymnasiumSubEnv(SubEnv):
    """One environment from ``gymnasium.make``.

    Args:
        id (str): its id, for messages.
        env (gymnasium.Env): the environment.
        action_repeat (int): environment steps per agent step.
        episode_length (int, optional): agent steps after which to truncate.
        index (int): position in the batch.
        keys (sequence of str, optional): entries of a ``Dict`` observation to use, in order. Defaults to ``None``, all
            of them.
    """

    def __init__(
        self,
        id: str,
        env: gymnasium.Env,
        action_repeat: int,
        episode_length: int | None,
        index: int,
        keys: Sequence[str] | None = None,
    ) -> None:
        check_action_space(id, env.action_space)
        self._pieces = _observed(id, env.observation_space, keys)
        super().__init__(
            id,
            sum(size for _, size in self._pieces),
            env.action_space.low,
            env.action_space.high,
            action_repeat,
            episode_length,
            index,
        )
        self.simulator = env
        self._action_shape = env.action_space.shape
        self._action_dtype = env.action_space.dtype
        self._mujoco = _is_mujoco(env)
        self._physics = PhysicsState(env.unwrapped.model) if self._mujoco else None
        self._unstable = instability_warnings() if self._mujoco else []

    def own_episode_length(self) -> int | None:
        """The registered time limit in agent steps."""
        limit = self.simulator.spec.max_episode_steps if self.simulator.spec else None
        return math.ceil(limit / self.action_repeat) if limit and limit > 0 else None

    def terminates(self) -> bool:
        """Whether an episode can end before its time limit.

        False only for gymnasium's own simulators that are known not to; third-party simulators and wrappers may.
        """
        layers = [*_wrappers(self.simulator), self.simulator.unwrapped]
        if not all(type(layer).__module__.startswith("gymnasium.") for layer in layers):
            return True
        if type(self.simulator.unwrapped).__name__ in _NEVER_TERMINATE:
            return False
        return bool(getattr(self.simulator.unwrapped, "_terminate_when_unhealthy", True))

    def _raw_reset(self, seed: int | None) -> np.ndarray:
        observation, _ = self.simulator.reset(seed=seed)
        return self._flat(observation)

    def _raw_step(self, action: np.ndarray) -> RawStep:
        action = action.astype(self._action_dtype).reshape(self._action_shape)
        observation, reward, terminated, truncated, _ = self.simulator.step(action)
        if self._mujoco and self.simulator.unwrapped.data.warning.number[self._unstable].any():
            # MuJoCo silently resets a diverged simulation and continues.
            raise FloatingPointError("the simulation became unstable (MuJoCo: bad position, velocity or acceleration)")
        return self._flat(observation), float(reward), bool(terminated), bool(truncated)

    def _flat(self, observation: Any) -> np.ndarray:
        """Concatenated pieces in the order of the space, as a new float32 array."""
        if len(self._pieces) == 1 and not self._pieces[0][0]:
            return np.array(observation, np.float32).ravel()
        return np.concatenate([np.asarray(_pick(observation, p), np.float32).ravel() for p, _ in self._pieces])

    def can_save(self) -> bool:
        """Whether the exact state can be saved: only of known simulators in wrappers without further state."""
        plain = all(
            type(layer).__name__ in _PLAIN_WRAPPERS and type(layer).__module__.startswith("gymnasium.wrappers")
            for layer in _wrappers(self.simulator)
        )
        return plain and (self._mujoco or _is_classic_control(self.simulator))

    def state_support(self) -> str:
        """Text that says what can be saved."""
        if self._mujoco:
            return "exact: MuJoCo physics with warm start, clock, elapsed steps, random generator"
        if self.can_save():
            return "exact: simulator variables, elapsed steps, random generator"
        if self._mujoco or _is_classic_control(self.simulator):
            names = ", ".join(type(layer).__name__ for layer in _wrappers(self.simulator))
            return f"none: one of the wrappers {names} may have a state of its own"
        return f"none: {type(self.simulator.unwrapped).__module__} is neither classic control nor MuJoCo"

    def save_simulator(self) -> dict[str, Any]:
        core = self.simulator.unwrapped
        state = {
            "attributes": save_attributes(core, skip=PRESENTATION),
            "random": save_random(core.np_random),
            "wrappers": [_bookkeeping(layer) for layer in _wrappers(self.simulator)],
        }
        if self._physics is not None:
            state["physics"] = self._physics.save(core.model, core.data)
        return state

    def load_simulator(self, state: dict[str, Any]) -> None:
        core = self.simulator.unwrapped
        load_attributes(core, state["attributes"])
        load_random(core.np_random, state["random"])
        for layer, saved in zip(_wrappers(self.simulator), state["wrappers"], strict=True):
            for name, value in saved.items():
                setattr(layer, name, value)
        if self._physics is not None:
            self._physics.load(core.model, core.data, state["physics"])

    def draw(self) -> np.ndarray:
        if self.simulator.render_mode != "rgb_array":
            raise ConfigurationError(f"{self.name} was made without render=True")
        return self.simulator.render()

    def close(self) -> None:
        self.simulator.close()


def instability_warnings() -> list[int]:
    """Indices of MuJoCo's warnings about non-finite or huge values."""
    import mujoco

    kinds = mujoco.mjtWarning
    return [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]


def check_action_space(id: str, space: spaces.Space) -> None:
    """Raise ConfigurationError unless actions are continuous."""
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        raise ConfigurationError(
            f"env.id={id!r} has the action space {space}: PWM differentiates through actions, "
            "so only continuous ones (a Box of floats) are supported, not discrete ones"
        )


def _observed(id: str, space: spaces.Space, keys: Sequence[str] | None) -> list[tuple[tuple, int]]:
    """The pieces of an observation that ``env.observation_keys`` selects, in its order; all pieces without it."""
    pieces = observation_pieces(id, space)
    if keys is None:
        return pieces
    if not isinstance(space, spaces.Dict):
        raise ConfigurationError(
            f"env.observation_keys={list(keys)}: {id} observes a {type(space).__name__}, which has no entries to choose"
        )
    return [piece for key in chosen(id, space.spaces, keys) for piece in pieces if piece[0][0] == key]


def observation_pieces(id: str, space: spaces.Space, path: tuple = ()) -> list[tuple[tuple, int]]:
    """Path and length of each vector in an observation, in the order of the space.

    Raises:
        ConfigurationError: for images and for spaces that are not vectors.
    """
    if isinstance(space, spaces.Box):
        if len(space.shape) >= 2 and (space.dtype == np.uint8 or len(space.shape) >= 3):
            raise ConfigurationError(
                f"env.id={id!r} observes images of shape {space.shape}: only vectors of numbers are supported"
            )
        return [(path, math.prod(space.shape))]
    if isinstance(space, spaces.Dict):
        items: Any = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        items = enumerate(space.spaces)
    else:
        raise ConfigurationError(
            f"env.id={id!r} has the observation space {space}: only vectors of numbers (Box), "
            "and Dict or Tuple of them, are supported"
        )
    return [piece for key, sub in items for piece in observation_pieces(id, sub, (*path, key))]


def _pick(observation: Any, path: tuple) -> Any:
    for key in path:
        observation = observation[key]
    return observation


def _is_classic_control(env: gymnasium.Env) -> bool:
    return type(env.unwrapped).__module__.startswith("gymnasium.envs.classic_control")


def _is_mujoco(env: gymnasium.Env) -> bool:
    return type(env.unwrapped).__module__.startswith("gymnasium.envs.mujoco") and hasattr(env.unwrapped, "data")


def _wrappers(env: Any) -> list[Any]:
    layers = []
    while env is not env.unwrapped:
        layers.append(env)
        env = env.env
    return layers


def _bookkeeping(wrapper: Any) -> dict[str, Any]:
    """Counters of gymnasium's TimeLimit and OrderEnforcing."""
    return {name: vars(wrapper)[name] for name in ("_elapsed_steps", "_has_reset") if name in vars(wrapper)}


# Meta-World, whose environments are gymnasium's -----------------------------------------------------------------------


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
