"""One DeepMind Control environment of a batch, and the whole state of a MuJoCo simulation; imports dm_control."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import dm_env
import numpy as np
import torch
from dm_control.rl import control

from pwm_torchrl.envs.batch import RawStep, SubEnv
from pwm_torchrl.envs.env_state import load_attributes, load_random, save_attributes, save_random
from pwm_torchrl.errors import ConfigurationError

__all__ = ["DMControlSubEnv", "PhysicsState"]


class PhysicsState:
    """Saves and loads a MuJoCo model and its data.

    Args:
        model: ``mujoco.MjModel`` as built, before the first reset.
    """

    def __init__(self, model: Any) -> None:
        self._built = {name: _digest(array) for name, array in _arrays(model).items()}

    def shares_memory(self, data: Any, array: np.ndarray) -> bool:
        """Whether an array is a window into the physics rather than a copy of its values."""
        return any(np.may_share_memory(array, own) for own in _arrays(data).values())

    def save(self, model: Any, data: Any) -> dict[str, Any]:
        """Arrays of ``data``, its clock, and the arrays of ``model`` that differ from the built ones."""
        changed = {
            name: torch.tensor(array)
            for name, array in _arrays(model).items()
            if _digest(array) != self._built.get(name)
        }
        kept = {name: torch.tensor(array) for name, array in _arrays(data).items()}
        return {"model": changed, "data": kept, "time": float(data.time)}

    def load(self, model: Any, data: Any, state: dict[str, Any]) -> None:
        """Put back what :meth:`save` gave, into a model of the same kind."""
        import mujoco

        _write(model, state["model"])
        _write(data, state["data"])
        data.time = state["time"]
        # Contacts and constraints live in an arena of changing size: recompute them from the state. That overwrites
        # derived arrays and the solver's warm start, so the saved ones are written once more.
        mujoco.mj_forward(model, data)
        _write(data, state["data"])
        data.time = state["time"]


def _arrays(owner: Any) -> dict[str, np.ndarray]:
    """The writable numeric arrays of fixed size of an MjModel or MjData."""
    found = {}
    for name in dir(owner):
        if name.startswith(("_", "efc_")) or name in _ARENA:
            continue
        value = getattr(owner, name, None)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "biuf" and value.flags.writeable:
            found[name] = value
    return found


# Sized by the number of contacts and constraints of the moment.
_ARENA = frozenset({"contact", "iefc_id", "solver_niter"})


def _write(owner: Any, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in saved.items():
        target = getattr(owner, name)
        if target.shape == tuple(tensor.shape):
            target[...] = tensor.numpy()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


class DMControlSubEnv(SubEnv):
    """One ``dm_control.rl.control.Environment``.

    Args:
        name (str): label for messages.
        env (control.Environment): the environment.
        action_repeat (int): environment steps per agent step.
        episode_length (int, optional): agent steps after which to truncate.
        index (int): position in the batch.
        frame_size (tuple of int): height and width of pictures. Defaults to ``(256, 256)``.
    """

    def __init__(
        self,
        name: str,
        env: control.Environment,
        action_repeat: int,
        episode_length: int | None,
        index: int,
        frame_size: tuple[int, int] = (256, 256),
    ) -> None:
        self._keys = _vector_keys(name, env)
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
        # dm_env's convention: a last step that still counts on a future has discount 1.
        terminated = bool(last and step.discount < 1.0)
        return self._flat(step.observation), float(step.reward), terminated, last and not terminated

    def _flat(self, observation: Any) -> np.ndarray:
        """Concatenation of the entries in the order of the specification; a new array, float32."""
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
    """Length of every entry of the observation, in the order of the specification."""
    lengths = {}
    for key, spec in env.observation_spec().items():
        if len(spec.shape) >= 2 and (spec.dtype == np.uint8 or len(spec.shape) >= 3):
            raise ConfigurationError(
                f"{name} observes images of shape {spec.shape} ({key}): only vectors of numbers are supported"
            )
        lengths[key] = math.prod(spec.shape)
    return lengths
