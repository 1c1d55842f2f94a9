"""From configuration to environment: finds the maker, gives it what it accepts, batches and standardises the result."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torchrl.envs import EnvBase, SerialEnv

from pwm_torchrl.envs.standard import (
    EnvInfo,
    GuardedEnv,
    check_maker_arguments,
    check_usable,
    env_info,
    env_layers,
    standardize,
)
from pwm_torchrl.envs.workers import OpenEnv, ended_by_sigterm
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, is_ours, nearest, said
from pwm_torchrl.terminal import warn
from pwm_torchrl.user_code import locate

__all__ = ["make_env", "opened_env", "probe_env"]

_log = logging.getLogger(__name__)

# This package's own makers, which make as many environments as they are asked for.
_OWN = "pwm_torchrl."

# Keys of the configuration that belong to this module; a maker gets them only if it names them itself.
RESERVED = ("_target_", "name", "num_envs", "seed", "device", "render", "action_repeat", "episode_length", "terminates",
            "observation_keys")  # fmt: skip


#: Keys that a run gives to makers itself, and what sets them.
ELSEWHERE = {
    "seed": "the environments' seeds follow from seed",
    "render": "training.video=true films, and evaluate --video",
}


def make_env(
    env_cfg: Mapping[str, Any],
    *,
    num_envs: int,
    seed: int,
    device: torch.device | str = "cpu",
    render: bool = False,
) -> EnvBase:
    """Environment of a configuration, whoever wrote its maker.

    ``env_cfg["_target_"]`` is the dotted path of a maker, a function or class that returns a TorchRL environment; the
    other keys are its keyword arguments. A maker gets those of ``num_envs``, ``seed``, ``device`` and ``render`` that
    its signature names. If it returns an environment without batch, N of them (seeds ``seed``, ``seed + 1``, ...) are
    stepped one after the other.

    Keys that this function understands for makers that do not: ``name`` (label), ``episode_length`` (truncate after so
    many agent steps), ``terminates`` (whether episodes can end otherwise), ``observation_keys`` (entries that make up
    the observation).

    Args:
        env_cfg (Mapping): the configuration.

    Keyword Args:
        num_envs (int): ``N``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``.
        device (torch.device or str): where the tensors go. Defaults to ``"cpu"``.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: see :func:`~pwm_torchrl.envs.standardize`.

    Raises:
        ConfigurationError: if the maker cannot be found or called so, or what it makes cannot be used.

    Examples:
        >>> from pwm_torchrl.envs import make_env
        >>> cfg = {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "id": "Pendulum-v1"}
        >>> make_env(cfg, num_envs=4, seed=0).batch_size
        torch.Size([4])
    """
    maker = _maker_of(env_cfg, num_envs)
    offered = {"num_envs": num_envs, "seed": seed, "device": device, "render": render}
    return _completed(_call(maker, offered), env_cfg, maker, offered, {"env.num_envs": num_envs}, seeded=True)


@contextlib.contextmanager
def opened_env(
    env_cfg: Mapping[str, Any],
    *,
    num_envs: int,
    seed: int,
    device: torch.device | str = "cpu",
    render: bool = False,
) -> Iterator[EnvBase]:
    """:func:`make_env` for the length of a block, as a run has its environments.

    However the block ends, also by SIGTERM, which ends it as Ctrl-C does, the environment is closed and no process of
    it is left; what it raises while closing is a warning, and a worker process that has died is named.

    Raises:
        EnvironmentFault: if a worker process has died.
        KeyboardInterrupt: for SIGTERM.
    """
    name = str(env_cfg.get("name") or env_cfg.get("_target_"))
    with ended_by_sigterm():
        with OpenEnv.opening(name, seed) as opened:
            env = opened.hold(make_env(env_cfg, num_envs=num_envs, seed=seed, device=device, render=render))
        try:
            with opened.naming_dead_workers():
                yield env
        finally:
            try:
                opened.close()
            except Exception as error:  # noqa: BLE001 - it must not hide what ended the block
                warn(f"closing the environment {name} failed: {said(error)}")


def probe_env(env_cfg: Mapping[str, Any], sizes: Mapping[str, int], *, device: torch.device | str = "cpu") -> EnvInfo:
    """Make an environment once, read its facts and close it again, whatever happens.

    As little as can be is made: of this package's own environments, and of those that come one at a time, a single
    one; a batch that its maker puts together is made whole, but nothing in it is started (the workers of a
    ``ParallelEnv`` are not).

    Args:
        env_cfg (Mapping): as for :func:`make_env`.
        sizes (Mapping): by their keys of the configuration, the numbers of environments that the run will ask for.
            The first is that of training.

    Keyword Args:
        device (torch.device or str): where it is made. Defaults to ``"cpu"``.

    Returns:
        EnvInfo: facts of the batch that training would get.

    Raises:
        ConfigurationError: if it cannot be made or used, or has a batch of its own that is not of these sizes.
    """
    (key, asked), *_ = sizes.items()
    maker = _maker_of(env_cfg, asked)
    asks = "num_envs" in _named(maker.function)
    count = 1 if maker.target.startswith(_OWN) or not asks else asked
    with ended_by_sigterm():
        with OpenEnv.opening(maker.target, 0) as opened:  # not held by it, which would start its workers
            env = _call(maker, {"num_envs": count, "seed": 0, "device": device, "render": False})
            if not env.batch_size:
                count = 1
            offered = {"num_envs": count, "seed": 0, "device": device, "render": False}
            wanted = {key: count} if asks or not env.batch_size else sizes
            env = _completed(env, env_cfg, maker, offered, wanted, seeded=False)
        opened.hold(env)
        try:
            return replace(env_info(env), num_envs=asked)
        finally:
            _close(opened, maker.target)


class _Maker(NamedTuple):
    """A maker of environments, where it was found, and what it gets of the configuration."""

    target: str
    function: Callable[..., Any]
    arguments: dict[str, Any]


def _maker_of(env_cfg: Mapping[str, Any], num_envs: int) -> _Maker:
    """The maker of a configuration."""
    target = env_cfg.get("_target_")
    if not target:
        raise ConfigurationError(
            "env._target_ is missing: give the dotted path of a function that makes the environment"
        )
    function = _locate(str(target))
    check_maker_arguments(num_envs, env_cfg.get("action_repeat") or 1, env_cfg.get("episode_length"))
    return _Maker(str(target), function, _arguments(str(target), function, env_cfg))


def _completed(
    env: EnvBase,
    env_cfg: Mapping[str, Any],
    maker: _Maker,
    offered: dict[str, Any],
    sizes: Mapping[str, int],
    *,
    seeded: bool,
) -> EnvBase:
    """What a maker returned, checked, batched and standardised; closed if it cannot be used."""
    target = maker.target
    keys = None if "observation_keys" in maker.arguments else env_cfg.get("observation_keys")
    name = str(env_cfg.get("name") or getattr(env.__dict__.get("pwm_info"), "name", None) or target)
    with _closing_on_error(env, target):
        check_usable(env, f"env._target_={target}", keys)
    if not env.batch_size:
        env.close()
        env, seeded = _batch(maker, offered, name), False  # its members have their seeds
    with _closing_on_error(env, target):
        for key, size in sizes.items():
            if env.batch_size != torch.Size([size]):
                raise ConfigurationError(
                    f"env._target_={target} made a batch of {list(env.batch_size)} instead of {key}={size}: "
                    "return an environment without batch, or accept num_envs"
                )
        if seeded and "seed" not in _named(maker.function):
            _seed(env, name, offered["seed"])
        env = standardize(
            _to_device(env, offered["device"]),
            name=name,
            seed=offered["seed"],
            episode_length=None if "episode_length" in maker.arguments else env_cfg.get("episode_length"),
            terminates=env_cfg.get("terminates"),
            observation_keys=keys,
        )
        _rename(env, name)
        if "terminates" not in maker.arguments:
            _override(env, env_cfg)
    return env


def _override(env: EnvBase, env_cfg: Mapping[str, Any]) -> None:
    """``env.terminates`` counts, whatever an environment of this package found out itself."""
    for layer in env_layers(env):
        if "pwm_info" in layer.__dict__:
            layer.pwm_info = as_stated(layer.pwm_info, env_cfg)
            return


def as_stated(info: EnvInfo, env_cfg: Mapping[str, Any]) -> EnvInfo:
    """Facts with what the configuration says of them.

    Raises:
        ConfigurationError: if ``env.terminates`` is neither true nor false.
    """
    terminates = env_cfg.get("terminates")
    if terminates is None:
        return info
    if not isinstance(terminates, bool):
        raise ConfigurationError(f"env.terminates={terminates!r} is not true or false")
    return replace(info, terminates=terminates)


@contextlib.contextmanager
def _closing_on_error(env: EnvBase, target: str) -> Iterator[None]:
    """Closes an environment that cannot be used: the processes of a ``ParallelEnv`` would outlive the error."""
    try:
        yield
    except BaseException as error:
        opened = OpenEnv(target, 0)
        opened.hold(env)
        _close(opened, target)
        if is_ours(error) or not isinstance(error, Exception):
            raise
        raise ConfigurationError(f"env._target_={target} made an environment that raised {said(error)}") from error


def _close(opened: OpenEnv, target: str) -> None:
    """Close an environment; what it says to that concerns nobody who asked for its facts alone."""
    try:
        opened.close()
    except Exception as error:  # noqa: BLE001 - a user's environment may raise anything
        _log.warning("env._target_=%s: closing it raised %s", target, said(error))


def _locate(target: str) -> Callable[..., Any]:
    """The function or class at a dotted path."""
    maker = locate("env._target_", target)
    if not callable(maker):
        raise ConfigurationError(f"env._target_={target!r} is a {type(maker).__name__}, not a function or class")
    return maker


def _named(maker: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters that a maker names itself (a catch-all ``**kwargs`` is not one)."""
    try:
        parameters = inspect.signature(maker).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: parameter for key, parameter in parameters.items() if parameter.kind in kinds}


def _takes_any(maker: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _arguments(target: str, maker: Callable[..., Any], env_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the configuration that go to the maker, checked against its signature."""
    named, takes_any = _named(maker), _takes_any(maker)
    offered = ("_target_", "num_envs", "seed", "device", "render")
    arguments = {}
    for key, value in env_cfg.items():
        if key in ELSEWHERE and value is not None:
            raise ConfigurationError(f"env.{key}={value!r} has no effect: {ELSEWHERE[key]}")
        if key == "observation_keys" and value is not None and key not in named and target.startswith(_OWN):
            raise ConfigurationError(f"env.{key}={value!r} is not an argument of {target}, which has one observation")
        if key in offered or (key in RESERVED and key not in named):
            continue
        if key not in named and not takes_any:
            known = [k for k in named if k not in offered]
            near = nearest(str(key), known)
            raise ConfigurationError(
                f"env.{key}={value!r} is not an argument of {target}"
                + (f", did you mean {near}?" if near else f": it takes {', '.join(known) or 'none'}")
            )
        arguments[str(key)] = value
    repeat = env_cfg.get("action_repeat")
    if repeat not in (None, 1) and "action_repeat" not in named:
        raise ConfigurationError(
            f"env.action_repeat={repeat}, but {target} has no argument action_repeat: repeat actions in the maker"
        )
    missing = [
        key
        for key, p in named.items()
        if p.default is inspect.Parameter.empty and key not in arguments and key not in offered
    ]
    if missing:
        raise ConfigurationError(f"env.{missing[0]} is missing: {target} needs it")
    return arguments


def _call(maker: _Maker, offered: dict[str, Any]) -> EnvBase:
    target, named = maker.target, _named(maker.function)
    try:
        env = maker.function(**maker.arguments, **{key: value for key, value in offered.items() if key in named})
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"env._target_={target} raised {said(error)}") from error
    if not isinstance(env, EnvBase):
        raise ConfigurationError(
            f"env._target_={target} returned a {type(env).__name__}: it must return a TorchRL environment (EnvBase), "
            "for example torchrl.envs.GymWrapper(env)"
        )
    return env


def _batch(maker: _Maker, offered: dict[str, Any], name: str) -> EnvBase:
    """N environments without batch, one after the other, each with its own seed."""
    first = offered["seed"]

    def make(index: int) -> EnvBase:
        env = _call(maker, {**offered, "seed": first + index, "num_envs": 1})
        if "seed" not in _named(maker.function):
            _seed(env, name, first + index)
        return GuardedEnv(env, name=name, seed=first + index, index=index)

    count = offered["num_envs"]
    # One function with arguments, not N functions: TorchRL takes those for N different kinds of environment.
    batch = SerialEnv(count, make, create_env_kwargs=[{"index": i} for i in range(count)])
    batch.start()  # otherwise its members exist only after the first reset
    return batch


def _seed(env: EnvBase, name: str, seed: int) -> None:
    """Seed an environment whose maker takes no seed."""
    try:
        env.set_seed(seed, static_seed=True)
    except Exception as error:
        raise EnvironmentFault(name, f"set_seed raised {said(error)}", seed=seed) from error


def _to_device(env: EnvBase, device: torch.device | str) -> EnvBase:
    device = torch.device(device)
    return env if env.device == device else env.to(device)


def _rename(env: EnvBase, name: str) -> None:
    for layer in env_layers(env):
        info = layer.__dict__.get("pwm_info")
        if info is not None and info.name != name:
            layer.pwm_info = replace(info, name=name)
            if hasattr(type(layer), "rename"):
                layer.rename(name)
