"""Batched environments of dflex's differentiable simulations, and their maker."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from pwm_torchrl.envs.differentiable import RandomStream, SimulatedEnv, check_simulation, message_of
from pwm_torchrl.envs.standard import EnvInfo
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, MissingLibraryError, nearest

__all__ = ["CLASSES", "INSTALL", "REWARPED", "DFlexEnv", "make_dflex_env", "missing_dflex"]

INSTALL = "pip install 'git+https://github.com/imgeorgiev/DiffRL.git#subdirectory=dflex'"


class DFlexEnv(SimulatedEnv):
    """A batched dflex simulation as a TorchRL environment of batch size ``[N]``.

    dflex resets finished rows inside ``step``. Here, the step returns the true last observation, and the following
    reset returns the observation that the simulator has already drawn. As in dflex, rewards are those of the state
    before the transition.

    Args:
        simulator: an object with dflex's interface: ``num_envs``, ``num_obs``, ``num_actions``, ``episode_length``,
            ``reset(env_ids, grads, force_reset)`` and ``step(actions)``.

    Keyword Args:
        name (str): label for messages.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulator. Defaults to ``"cpu"``.
        terminates (bool): whether episodes can end before their time limit. Defaults to ``True``.
    """

    state_support = "none: dflex cannot save its complete state, so a resumed run begins with new episodes"

    def __init__(
        self,
        simulator: Any,
        *,
        name: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        terminates: bool = True,
    ) -> None:
        n, observation_dim, action_dim = simulator.num_envs, simulator.num_obs, simulator.num_actions
        self._random = RandomStream(torch.device(device))
        super().__init__(
            EnvInfo(
                name=name,
                observation_dim=observation_dim,
                action_dim=action_dim,
                episode_length=int(simulator.episode_length),
                action_repeat=1,
                num_envs=n,
                terminates=terminates,
                seed=seed,
                action_low=(-1.0,) * action_dim,
                action_high=(1.0,) * action_dim,
            ),
            device,
        )
        self.simulator = simulator
        # Rows that the simulator has reset inside its last step, and the current observation of each row.
        self._already_reset = torch.zeros(n, dtype=torch.bool, device=self.device)
        self._current = torch.zeros(n, observation_dim, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed = seed
            self._random.seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action").detach().clone()
        with self._guarded("step"), torch.no_grad(), self._random.active():
            observation_after_reset, reward, done, extras = self.simulator.step(action)
        try:
            last, terminated, truncated = (extras[k] for k in ("obs_before_reset", "termination", "truncation"))
        except KeyError as error:
            raise ConfigurationError(
                f"{self.pwm_info.name}: step of this dflex version returns no extras[{error.args[0]!r}], which has the "
                f"last observations or terminations; install the paper's version: {INSTALL}"
            ) from error
        # dflex reuses its buffers, and its tensors may have graphs, so all results are detached copies.
        last, reward = last.detach().clone().float(), reward.detach().clone().float().view(-1, 1)
        terminated = terminated.detach().clone().bool().view(-1, 1)
        truncated = truncated.detach().clone().bool().view(-1, 1)
        done = done.detach().clone().bool().view(-1, 1) | terminated | truncated
        self._current = observation_after_reset.detach().clone().float()
        self._already_reset = done.view(-1).clone()
        return self.stepped(last, reward, terminated, truncated)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._current = self._simulator_reset(None)
            self._already_reset = torch.zeros_like(self._already_reset)
        else:
            rows = mask.view(-1)
            pending = rows & ~self._already_reset
            if pending.any():
                fresh = self._simulator_reset(pending.nonzero().squeeze(-1))
                self._current = torch.where(pending.unsqueeze(-1), fresh, self._current)
            self._already_reset = self._already_reset & ~rows
        return self.began(self._current.clone())

    def _simulator_reset(self, rows: torch.Tensor | None) -> torch.Tensor:
        with self._guarded("reset"), torch.no_grad(), self._random.active():
            # Some versions interpret force_reset=True as "all rows" and ignore env_ids.
            observation = self.simulator.reset(env_ids=rows, force_reset=rows is None)
        return observation.detach().clone().float()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise EnvironmentFault(self.pwm_info.name, f"{what} raised {message_of(error)}", seed=self._seed) from error

    def render_frame(self) -> np.ndarray:
        """Always raises ConfigurationError, because dflex writes USD scenes and no images."""
        raise ConfigurationError(f"{self.pwm_info.name} cannot be rendered: dflex draws no images")


CLASSES = {
    "hopper": "HopperEnv",
    "ant": "AntEnv",
    "anymal": "AnymalEnv",
    "humanoid": "HumanoidEnv",
    "snu_humanoid": "SNUHumanoidEnv",
}

#: Tasks that rewarped also has.
REWARPED = ("ant", "hopper", "humanoid")


def make_dflex_env(
    name: str,
    num_envs: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    episode_length: int = 1000,
    stochastic_init: bool = True,
    early_termination: bool = True,
    no_grad: bool = True,
    module: str = "dflex.envs",
    render: bool = False,
    **simulator_kwargs: Any,
) -> EnvBase:
    """Make a dflex simulation with N environments.

    Args:
        name (str): ``"hopper"``, ``"ant"``, ``"anymal"``, ``"humanoid"`` or ``"snu_humanoid"``, optionally with the
            prefix ``dflex_``.
        num_envs (int): ``N``. Defaults to ``64``.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulation. Defaults to ``"cpu"``.
        episode_length (int): steps per episode. Defaults to ``1000``.
        stochastic_init (bool): random initial states. Defaults to ``True``.
        early_termination (bool): end the episode after a fall, in simulations with falls. Defaults to ``True``.
        no_grad (bool): simulate without gradients, which PWM does not need. Defaults to ``True``.
        module (str): dotted path of the module with the simulator classes. Defaults to ``"dflex.envs"``.
        render (bool): ignored, because dflex draws no images. Defaults to ``False``.
        **simulator_kwargs: further arguments of the simulator's constructor, such as ``MM_caching_frequency``.

    Returns:
        EnvBase: a :class:`DFlexEnv`.

    Raises:
        ConfigurationError: for an unknown name or argument.
        MissingLibraryError: if dflex is not installed.
    """
    task = check_simulation(name, "dflex", CLASSES, num_envs, episode_length)
    cls = _simulator_class(_load(module, name), module, CLASSES[task])
    ours = {
        "num_envs": num_envs,
        "device": str(device),
        "render": False,
        "seed": seed,
        "episode_length": episode_length,
        "no_grad": no_grad,
        "stochastic_init": stochastic_init,
        "early_termination": early_termination,
    }
    arguments = _accepted(cls, ours, simulator_kwargs)
    construction = RandomStream(torch.device(device))  # constructors of simulators seed the global generators
    construction.seed(seed)
    try:
        with construction.active(), _numpy_1_names():
            simulator = cls(**arguments)
    except Exception as error:
        raise ConfigurationError(f"{module}.{CLASSES[task]} raised {message_of(error)}") from error
    return DFlexEnv(
        simulator,
        name=f"dflex_{task}",
        seed=seed,
        device=device,
        terminates=early_termination and bool(getattr(simulator, "early_termination", True)),
    )


def missing_dflex(name: object, module: str) -> MissingLibraryError:
    """The error for ``env.name`` if ``module`` is not installed, with installation instructions and an alternative."""
    task = str(name).removeprefix("dflex_")
    besides = f"; env=rewarped_{task} is rewarped's version of it, from PyPI" if task in REWARPED else ""
    return MissingLibraryError(
        f"env.name={name} needs {module}, which is not installed; dflex is not on a package index and licensed for "
        f"research only: {INSTALL}{besides}"
    )


@contextmanager
def _numpy_1_names() -> Iterator[None]:
    """Define ``np.Inf``, which NumPy 2 removed and dflex uses while its environments are imported and made."""
    added = [name for name in ("Inf",) if not hasattr(np, name)]
    for name in added:
        setattr(np, name, np.inf)
    try:
        yield
    finally:
        for name in added:
            delattr(np, name)


def _load(module: str, name: str) -> ModuleType:
    try:
        with _numpy_1_names():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name) and module.startswith("dflex"):
            raise missing_dflex(name, "dflex") from error
        raise MissingLibraryError(f"env.module={module!r} needs {error.name}, which is not installed") from error
    except Exception as error:  # dflex compiles its kernels when it is imported
        raise MissingLibraryError(f"env.module={module!r} cannot be loaded ({message_of(error)})") from error


def _simulator_class(loaded: ModuleType, module: str, name: str) -> Any:
    if not hasattr(loaded, name):
        raise ConfigurationError(f"env.module={module!r} has no class {name}")
    return getattr(loaded, name)


def _accepted(cls: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: ours that it accepts, and all of the user's, which it must accept."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {**ours, **theirs}
    unknown = [key for key in theirs if key not in parameters]
    if unknown:
        near = nearest(unknown[0], parameters)
        raise ConfigurationError(
            f"env.{unknown[0]} is not an argument of {cls.__name__}"
            + (f", did you mean {near}?" if near else f": it takes {', '.join(parameters)}")
        )
    return {**{key: value for key, value in ours.items() if key in parameters}, **theirs}
