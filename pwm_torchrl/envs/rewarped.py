"""Differentiable simulations of rewarped (https://arxiv.org/abs/2412.12089), and their maker.

rewarped re-implements dflex's tasks on NVIDIA Warp and is on PyPI. Its environments have internal state and reset
finished rows inside ``step``. :class:`RewarpedSimulator` uses their parts (equations of motion, observations, rewards
and initial states) as functions of an explicit state. Three things are changed: multi-axis joints (:func:`chained`),
Hopper's observations, and gradients, of which rewarped counts a part twice (:meth:`_World.simulate`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pwm_torchrl.envs.differentiable import DifferentiableEnv, RandomStream, check_simulation, message_of
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, require_installed

__all__ = ["TASKS", "RewarpedSimulator", "make_rewarped_env", "require_rewarped"]

#: Classes of the tasks in ``rewarped.envs.dflex``, by module. Its Anymal is a stub that raises NotImplementedError.
TASKS = {"ant": "Ant", "cartpole": "Cartpole", "hopper": "Hopper", "humanoid": "Humanoid"}

#: Tasks without falls; their classes have no early termination.
_ENDLESS = ("cartpole",)


class RewarpedSimulator:
    """A task of rewarped as a :class:`~pwm_torchrl.envs.differentiable.Simulator`.

    The state consists of joint positions, joint velocities and the last action, which some observations contain.
    Rewards are those of the state after the transition. Gradients flow to states and actions if autograd records;
    otherwise nothing is recorded. On a GPU, contact forces are summed in no fixed order, so steps are not exactly
    reproducible.

    Args:
        task (str): a key of :data:`TASKS`.

    Keyword Args:
        stochastic_init (bool): random initial states. Defaults to ``True``.
        early_termination (bool): end the episode after a fall, in tasks with falls. Defaults to ``True``.

    Raises:
        MissingLibraryError: if rewarped is not installed.
        ConfigurationError: if rewarped cannot build the task.
    """

    def __init__(self, task: str, *, stochastic_init: bool = True, early_termination: bool = True) -> None:
        self.task, self.stochastic_init = task, stochastic_init
        self.terminates = early_termination and task not in _ENDLESS
        self._class = chained(_load(task))
        self._worlds: dict[tuple[int, torch.device], _World] = {}
        env = self._build(1, torch.device("cpu"))
        self.observation_dim, self.action_dim = int(env.num_obs), int(env.num_act)
        self.action_low, self.action_high = (-1.0,) * self.action_dim, (1.0,) * self.action_dim
        self._positions, self._velocities = env.start_joint_q.shape[1], env.start_joint_qd.shape[1]
        self.state_dim = self._positions + self._velocities + self.action_dim
        # The attributes of the environment that the task's functions read. Tensors have one row per environment, here
        # one, or apply to all environments.
        kinds = (int, float, Tensor, type(...))
        self._constants = {key: value for key, value in vars(env).items() if isinstance(value, kinds)}
        self._constants["scatter_actions"] = env.scatter_actions
        self._held = _World(env).bytes_per_row()

    def __reduce__(self) -> tuple[Any, ...]:
        # Warp arrays can be neither copied nor pickled, but a simulator has no state and can be rebuilt.
        return _rebuilt, (self.task, self.stochastic_init, self.terminates)

    def reset(self, count: int, generator: torch.Generator) -> Tensor:
        """Initial states ``[count, S]``, drawn by rewarped's own function with a seed from ``generator``."""
        device = generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        start = torch.zeros(count, self.state_dim, device=device)
        start[:, : self._positions] = self._constants["start_joint_q"].to(device)
        start[:, self._positions : -self.action_dim] = self._constants["start_joint_qd"].to(device)
        view = self._view(start)
        if self.stochastic_init:
            stream = RandomStream(device)
            stream.seed(seed)
            with stream.active(), _plain_scripts():
                self._class.randomize_init(view, torch.arange(count, device=device))
        joints = (getattr(view.state, key).view(count, -1) for key in ("joint_q", "joint_qd"))
        return torch.cat([*joints, view.actions], -1)

    def observe(self, state: Tensor) -> Tensor:
        """Observations ``[..., O]`` of states ``[..., S]``."""
        view = self._view(state.reshape(-1, self.state_dim))
        self._observe(view)
        observation: Tensor = view.obs_buf
        return observation.reshape(*state.shape[:-1], self.observation_dim)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of 1/60 s: next states ``[B, S]``, rewards ``[B, 1]`` and terminations ``[B, 1]``."""
        count, device = len(state), state.device
        view = self._view(state)
        with _plain_scripts():
            self._class.pre_physics_step(view, action)
        force = view.control.joint_act.reshape(count, -1)
        joints = (getattr(view.state, key).reshape(count, -1) for key in ("joint_q", "joint_qd"))
        world = self._held if isinstance(state, FakeTensor) else self._world(count, device)
        following = torch.cat([*_Physics.apply(world, *joints, force), view.actions], -1)
        view = self._view(following)
        self._observe(view)
        self._class.compute_reward(view)
        return following, view.rew_buf.unsqueeze(-1), view.terminated_buf.bool().unsqueeze(-1)

    def _observe(self, view: SimpleNamespace) -> None:
        with _plain_scripts():
            self._class.compute_observations(view)
        if self.task == "hopper":
            # rewarped 1.3.3 prepends the horizontal position to the 11 numbers that it declares, so its own rewards and
            # terminations would read shifted entries. dflex, the origin of the task, omits it.
            view.obs_buf = view.obs_buf[:, -self.observation_dim :]

    def _view(self, state: Tensor) -> SimpleNamespace:
        """A stand-in for rewarped's environment in states ``[B, S]``, which its functions read and write."""
        count, device = len(state), state.device
        fake = isinstance(state, FakeTensor)
        view = SimpleNamespace()
        for key, value in self._constants.items():
            if isinstance(value, Tensor):
                # Fake tensors cannot be mixed with real ones.
                value = torch.zeros(value.shape, dtype=value.dtype, device=device) if fake else value.to(device)
                value = value.expand(count, -1) if value.dim() == 2 and len(value) == 1 else value
            setattr(view, key, value)
        positions, velocities, view.actions = state.split((self._positions, self._velocities, self.action_dim), -1)
        view.num_envs, view.device, view.control = count, device, _Control()
        view.state = SimpleNamespace(joint_q=positions.reshape(-1), joint_qd=velocities.reshape(-1))
        view.reset_buf = torch.zeros(count, dtype=torch.bool, device=device)
        view.progress_buf = torch.zeros(count, dtype=torch.int32, device=device)  # the simulator has no time limit
        return view

    def _world(self, count: int, device: torch.device) -> _World:
        if (count, device) not in self._worlds:
            self._worlds[count, device] = _World(self._build(count, device))
        return self._worlds[count, device]

    def _build(self, count: int, device: torch.device) -> Any:
        try:
            with _quiet():
                env = self._class(
                    num_envs=count,
                    early_termination=self.terminates,
                    no_grad=False,
                    no_env_offset=True,  # all rows at the same position, so that results do not depend on the row index
                    use_graph_capture=False,
                    device=str(device),
                )
                env.init()  # compiles Warp's kernels once per machine, in about half a minute
        except Exception as error:
            raise ConfigurationError(
                f"env.name=rewarped_{self.task}: rewarped could not build {count} environments on {device} "
                f"({message_of(error)})"
            ) from error
        return env


def _rebuilt(task: str, stochastic_init: bool, early_termination: bool) -> RewarpedSimulator:
    return RewarpedSimulator(task, stochastic_init=stochastic_init, early_termination=early_termination)


def chained(cls: Any) -> Any:
    """A subclass of a rewarped task that replaces multi-axis joints by chains of one-axis joints and massless bodies.

    For each axis of such a joint, Warp's integrator ignores the motion of the joint's other axes, and so creates
    momentum. rewarped's Hopper, whose root has two slides and a hinge, flies away and overflows within 20 frames; its
    Humanoid accelerates in free fall. dflex uses chains. Coordinates and their order do not change.

    A hinge that follows slides goes through the origin of its body, as in Hopper's model file. rewarped reads one
    position for all joints of a body, here that of a slide, and would rotate Hopper about a point on the ground.
    """

    class Chained(cls):
        def create_articulation(self, builder: Any) -> None:
            draft = self.create_modelbuilder()
            super().create_articulation(draft)
            extra = [max(sum(axes) - 1, 0) for axes in draft.joint_axis_dim]
            if not any(extra):
                super().create_articulation(builder)
                return
            between = iter(extra)
            warp = importlib.import_module("warp")
            kinds = importlib.import_module("warp.sim")
            add_body, add_joint = builder.add_body, builder.add_joint

            def body(*args: Any, **kwargs: Any) -> int:
                for _ in range(next(between)):  # first, since the integrator numbers bodies like joints
                    add_body()
                return int(add_body(*args, **kwargs))

            def joint(
                kind: Any, parent: int, child: int, linear_axes: Any = (), angular_axes: Any = (), **kwargs: Any
            ) -> None:
                axes = [(kinds.JOINT_PRISMATIC, {"linear_axes": [axis]}) for axis in linear_axes]
                axes += [(kinds.JOINT_REVOLUTE, {"angular_axes": [axis]}) for axis in angular_axes]
                if len(axes) < 2:
                    add_joint(kind, parent, child, linear_axes, angular_axes, **kwargs)
                    return
                name, start, end = (kwargs.pop(key) for key in ("name", "parent_xform", "child_xform"))
                for number, (kind, axis) in enumerate(axes):
                    link = child - len(axes) + 1 + number
                    places = {"parent_xform": start if number == 0 else None}
                    if linear_axes and number == len(linear_axes):
                        places = {"parent_xform": warp.transform_inverse(end)}
                    elif number == len(axes) - 1:
                        places["child_xform"] = end
                    add_joint(kind, parent, link, name=f"{name}_{number}", **places, **axis, **kwargs)
                    parent = link

            builder.add_body, builder.add_joint = body, joint
            super().create_articulation(builder)
            del builder.add_body, builder.add_joint

    Chained.__name__ = cls.__name__
    return Chained


class _Control:
    """Stores the joint forces that ``pre_physics_step`` computes."""

    joint_act: Tensor

    def assign(self, name: str, values: Tensor) -> None:
        setattr(self, name, values)


class _World:
    """Warp's model and integrator for a number of environments."""

    def __init__(self, env: Any) -> None:
        self.model, self.integrator = env.model, env.integrator
        self.wp = importlib.import_module("warp")
        self._substeps, self._dt = int(env.sim_substeps), float(env.sim_dt)

    def simulate(self, positions: Tensor, velocities: Tensor, force: Tensor, record: bool) -> tuple[Any, Any, Any, Any]:
        """Simulate one frame from joint states ``[B, Q]`` and ``[B, V]`` with joint forces ``[B, V]``.

        Returns:
            tuple: the tape, ``None`` unless ``record``, and Warp's first state, last state and control.
        """
        states = self._states(record)
        first, last = states[0], states[-1]
        control = self.model.control(requires_grad=record)
        for array, values in ((first.joint_q, positions), (first.joint_qd, velocities), (control.joint_act, force)):
            self.copy(array, values)
        self.integrator._step = 0  # the mass matrix is computed in the first substep of each frame
        tape = self.wp.Tape() if record else None
        with tape or contextlib.nullcontext():
            self.wp.sim.eval_fk(self.model, first.joint_q, first.joint_qd, None, first)
            for before, after in pairwise(states):
                before.clear_forces()
                self.wp.sim.collide(self.model, before)
                # The integrator computes the bodies' poses again, into the array of the state that it is given. If that
                # were the array that contacts were found with, both computations would pass on the sum of their
                # gradients, and it would count twice, as in rewarped's own environments.
                entering = copy.copy(before)
                entering.body_q = self.wp.zeros_like(before.body_q, requires_grad=record)
                self.integrator.simulate(self.model, entering, after, self._dt, control=control)
        return tape, first, last, control

    def copy(self, array: Any, values: Tensor) -> None:
        """Copy a tensor into a Warp array."""
        array.assign(self.wp.from_torch(values.detach().contiguous().view(-1), dtype=array.dtype))

    def read(self, array: Any, like: Tensor) -> Tensor:
        """A copy of a Warp array, in the shape of ``like``."""
        values: Tensor = self.wp.to_torch(array, requires_grad=False).clone().view_as(like)
        return values

    def synchronize(self) -> None:
        """Wait for the GPU, since torch and Warp use different streams."""
        if self.model.device.is_cuda:
            self.wp.synchronize_device(self.model.device)

    def bytes_per_row(self) -> int:
        """Bytes that a recorded step stores for its gradient, per environment."""
        states = self._states(True)
        arrays = [array for state in states for array in vars(state).values()]
        contacts = [array for key, array in vars(self.model).items() if key.startswith("rigid_contact_")]
        arrays += [*contacts, states[0].body_q] * self._substeps
        arrays = [array for array in arrays if isinstance(array, self.wp.array)]
        size = sum(array.capacity + (array.grad.capacity if array.grad is not None else 0) for array in arrays)
        return int(size) // int(self.model.num_envs)

    def _states(self, record: bool) -> list[Any]:
        return [self.model.state(requires_grad=record, copy="zeros") for _ in range(self._substeps + 1)]


class _Physics(torch.autograd.Function):
    """One frame of Warp's simulation as an autograd function, differentiated with Warp's tape."""

    @staticmethod
    def forward(ctx: Any, world: _World | int, positions: Tensor, velocities: Tensor, force: Tensor) -> Any:
        record = any(ctx.needs_input_grad)
        if isinstance(world, int):  # fake tensors: only shapes, and the memory that a tape would need
            ctx.kept = positions.new_empty(world * len(positions) if record else 0, dtype=torch.uint8)
            return torch.empty_like(positions), torch.empty_like(velocities)
        world.synchronize()
        tape, first, last, control = world.simulate(positions, velocities, force, record)
        world.synchronize()
        ctx.kept, ctx.used = (world, tape, first, last, control) if record else None, False
        ctx.like = positions, velocities, force
        return world.read(last.joint_q, positions), world.read(last.joint_qd, velocities)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, positions: Tensor, velocities: Tensor) -> Any:
        if isinstance(ctx.kept, Tensor):
            return None, torch.empty_like(positions), torch.empty_like(velocities), torch.empty_like(velocities)
        world, tape, first, last, control = ctx.kept
        world.synchronize()
        if ctx.used:  # a second backward pass of the same graph
            tape.zero()
        ctx.used = True
        world.copy(last.joint_q.grad, positions)
        world.copy(last.joint_qd.grad, velocities)
        tape.backward()
        world.synchronize()
        inputs = (first.joint_q, first.joint_qd, control.joint_act)
        return None, *(world.read(array.grad, like) for array, like in zip(inputs, ctx.like))


def make_rewarped_env(
    name: str,
    num_envs: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    episode_length: int = 1000,
    stochastic_init: bool = True,
    early_termination: bool = True,
) -> DifferentiableEnv:
    """Make a simulation of rewarped with N environments, which ``algorithm=shac`` can differentiate.

    Args:
        name (str): ``"ant"``, ``"cartpole"``, ``"hopper"`` or ``"humanoid"``, optionally with the prefix ``rewarped_``.
        num_envs (int): ``N``. Defaults to ``64``.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulation. Defaults to ``"cpu"``.
        episode_length (int): agent steps of 1/60 s per episode. Defaults to ``1000``.
        stochastic_init (bool): random initial states. Defaults to ``True``.
        early_termination (bool): end the episode after a fall, in tasks with falls. Defaults to ``True``.

    Returns:
        DifferentiableEnv: ``observation`` float32 ``[N, O]``, ``action`` float32 ``[N, A]`` in [-1, 1].

    Raises:
        ConfigurationError: for an unknown name or argument.
        MissingLibraryError: if rewarped is not installed.
    """
    task = check_simulation(name, "rewarped", TASKS, num_envs, episode_length)
    return DifferentiableEnv(
        RewarpedSimulator(task, stochastic_init=stochastic_init, early_termination=early_termination),
        name=f"rewarped_{task}",
        num_envs=num_envs,
        episode_length=episode_length,
        seed=seed,
        device=device,
    )


def require_rewarped(name: object) -> None:
    """Raise MissingLibraryError for ``env.name`` unless rewarped and its dependencies are installed."""
    how = "pip install 'pwm-torchrl[rewarped]' (Python 3.10 or 3.11)"
    require_installed(("rewarped", "warp", "gymnasium"), f"env.name={name}", how)


def _load(task: str) -> Any:
    """The task's class.

    Its module imports ``gym``, only for the ``Box`` class, but gym does not support NumPy 2. During the import,
    gymnasium takes its place.
    """
    require_rewarped(f"rewarped_{task}")
    stands_in = "gym" not in sys.modules
    try:
        with _quiet():
            if stands_in:
                sys.modules["gym"] = importlib.import_module("gymnasium")
            importlib.import_module("warp").config.quiet = True
            return getattr(importlib.import_module(f"rewarped.envs.dflex.{task}"), TASKS[task])
    except Exception as error:  # Warp starts when it is imported
        raise MissingLibraryError(
            f"env.name=rewarped_{task}: rewarped cannot be loaded ({message_of(error)})"
        ) from error
    finally:
        if stands_in:
            sys.modules.pop("gym", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard output and warnings within the context, also from native code, which reports missing CUDA.

    This also silences other threads. If the block raises, the discarded output is written after all.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    said = b""
    try:
        with tempfile.TemporaryFile() as discarded, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for descriptor in (1, 2):
                os.dup2(discarded.fileno(), descriptor)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    yield
            except BaseException:
                discarded.seek(0)
                said = discarded.read()
                raise
    finally:
        for descriptor, copy in zip((1, 2), kept):
            os.dup2(copy, descriptor)
            os.close(copy)
        if said:
            os.write(2, said)


@contextlib.contextmanager
def _plain_scripts() -> Iterator[None]:
    """Run TorchScript functions unoptimised: the optimisation after two calls would change rounding."""
    with torch.jit.optimized_execution(False):
        yield
