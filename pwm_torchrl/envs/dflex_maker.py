"""Maker for dflex's simulations, from the user's installation."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torchrl.envs import EnvBase

from pwm_torchrl.envs.arguments import check_maker_arguments
from pwm_torchrl.envs.dflex import INSTALL, DFlexEnv, RandomStream
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest

__all__ = ["CLASSES", "make_dflex_env"]

CLASSES = {
    "hopper": "HopperEnv",
    "ant": "AntEnv",
    "anymal": "AnymalEnv",
    "humanoid": "HumanoidEnv",
    "snu_humanoid": "SNUHumanoidEnv",
}


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
    """One of dflex's simulations with N environments.

    Args:
        name (str): ``"hopper"``, ``"ant"``, ``"anymal"``, ``"humanoid"`` or ``"snu_humanoid"``, also with ``dflex_`` in
            front, as tables call them.
        num_envs (int): ``N``. Defaults to ``64``.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): where it simulates. Defaults to ``"cpu"``.
        episode_length (int): steps per episode. Defaults to ``1000``.
        stochastic_init (bool): random initial states. Defaults to ``True``.
        early_termination (bool): let a fall end the episode, where the simulation has falls. Defaults to ``True``.
        no_grad (bool): simulate without gradients; PWM needs none. Defaults to ``True``.
        module (str): dotted path of the module that has the simulator classes. Defaults to ``"dflex.envs"``.
        render (bool): accepted like by the other makers; dflex draws no pictures. Defaults to ``False``.
        **simulator_kwargs: further arguments of the simulator's constructor, such as ``MM_caching_frequency``.

    Returns:
        EnvBase: a :class:`DFlexEnv`.

    Raises:
        ConfigurationError: for an unknown name or argument.
        MissingLibraryError: if dflex is not installed.
    """
    check_maker_arguments(num_envs, 1, episode_length)
    task = str(name).removeprefix("dflex_")
    if task not in CLASSES:
        near = nearest(task, CLASSES)
        raise ConfigurationError(
            f"env.name={name!r} is not a dflex simulation: "
            + (f"did you mean {near}?" if near else f"choose {', '.join(CLASSES)}")
        )
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
        with construction.active():
            simulator = cls(**arguments)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"{module}.{CLASSES[task]} raised {type(error).__name__}: {text}") from error
    return DFlexEnv(
        simulator,
        name=f"dflex_{task}",
        seed=seed,
        device=device,
        terminates=early_termination and bool(getattr(simulator, "early_termination", True)),
    )


def _load(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name) and module.startswith("dflex"):
            raise MissingLibraryError(
                f"env.name={name} needs dflex, which is not installed; it is on no package index and licensed for "
                f"research only: {INSTALL}"
            ) from error
        raise MissingLibraryError(f"env.module={module!r} needs {error.name}, which is not installed") from error
    except Exception as error:  # dflex compiles its kernels when it is imported
        text = " ".join(str(error).split())[:300]
        raise MissingLibraryError(f"env.module={module!r} cannot be loaded ({type(error).__name__}: {text})") from error


def _simulator_class(loaded: ModuleType, module: str, name: str) -> Any:
    if not hasattr(loaded, name):
        raise ConfigurationError(f"env.module={module!r} has no class {name}")
    return getattr(loaded, name)


def _accepted(cls: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our arguments that the constructor knows, and all of the user's, which it must know."""
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
