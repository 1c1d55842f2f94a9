"""Creates environments from a configuration: finds and calls the maker, batches and standardises the result."""

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

# Prefix of this package's own makers, which can make any number of environments.
_OWN = "pwm_torchrl."

# Keys of the configuration that this module handles; a maker gets them only if its signature names them.
RESERVED = ("_target_", "name", "num_envs", "seed", "device", "render", "action_repeat", "episode_length", "terminates",
            "observation_keys")  # fmt: skip


#: Keys that the run itself passes to makers, and the settings that control them.
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
    """Create the environment of a configuration, with a maker of this package or a user's own.

    ``env_cfg["_target_"]`` is the dotted path of a maker, a function or class that returns a TorchRL environment; the
    other keys are its keyword arguments. The maker also gets those of ``num_envs``, ``seed``, ``device`` and ``render``
    that its signature names. If it returns an unbatched environment, N of them (with seeds ``seed``, ``seed + 1``, ...)
    are stepped one after the other.

    This function handles some keys for makers without such parameters: ``name`` (label), ``episode_length`` (truncate
    after this many agent steps), ``terminates`` (whether episodes can end otherwise), ``observation_keys`` (entries
    that form the observation).

    Args:
        env_cfg (Mapping): the configuration.

    Keyword Args:
        num_envs (int): ``N``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: see :func:`~pwm_torchrl.envs.standardize`.

    Raises:
        ConfigurationError: if the maker cannot be found, does not accept the arguments, or makes an unusable
            environment.

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
    """:func:`make_env` as a context manager that closes the environment, as runs use it.

    However the block ends, the environment is closed and none of its processes is left. This includes SIGTERM, which
    ends the block like Ctrl-C. An error while closing becomes a warning; if a worker process died, the error names it.

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
    """Make an environment, read its facts and close it in any case.

    As little as possible is made: a single environment, if the maker is one of this package or returns unbatched
    environments; otherwise the maker's whole batch, without starting it (the workers of a ``ParallelEnv`` are not
    started).

    Args:
        env_cfg (Mapping): as for :func:`make_env`.
        sizes (Mapping): numbers of environments that the run will use, by configuration key; that of training first.

    Keyword Args:
        device (torch.device or str): device of the environment. Defaults to ``"cpu"``.

    Returns:
        EnvInfo: facts of the batch for training.

    Raises:
        ConfigurationError: if it cannot be made or used, or is a batch of a size other than these.
    """
    (key, asked), *_ = sizes.items()
    maker = _maker_of(env_cfg, asked)
    asks = "num_envs" in _named(maker.function)
    count = 1 if maker.target.startswith(_OWN) or not asks else asked
    with ended_by_sigterm():
        with OpenEnv.opening(maker.target, 0) as opened:  # hold() only after the block, or it would start the workers
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
    """A maker of environments, its dotted path, and its arguments from the configuration."""

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
    """Check, batch and standardise the environment that a maker returned; close it if it cannot be used."""
    target = maker.target
    keys = None if "observation_keys" in maker.arguments else env_cfg.get("observation_keys")
    name = str(env_cfg.get("name") or getattr(env.__dict__.get("pwm_info"), "name", None) or target)
    with _closing_on_error(env, target):
        check_usable(env, f"env._target_={target}", keys)
    if not env.batch_size:
        env.close()
        env, seeded = _batch(maker, offered, name), False  # its members are already seeded
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
    """Let ``env.terminates`` override what an environment of this package determined itself."""
    for layer in env_layers(env):
        if "pwm_info" in layer.__dict__:
            layer.pwm_info = as_stated(layer.pwm_info, env_cfg)
            return


def as_stated(info: EnvInfo, env_cfg: Mapping[str, Any]) -> EnvInfo:
    """Facts, overridden by those that the configuration states.

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
    """Closes the environment if the block raises: the processes of a ``ParallelEnv`` would outlive the error."""
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
    """Close an environment and only log errors, since the caller needs nothing but its facts."""
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
    """Parameters that a maker's signature names (``**kwargs`` does not count)."""
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
    """The configuration keys that are passed to the maker, checked against its signature."""
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
    """Batch N unbatched environments, stepped one after the other, each with its own seed."""
    first = offered["seed"]

    def make(index: int) -> EnvBase:
        env = _call(maker, {**offered, "seed": first + index, "num_envs": 1})
        if "seed" not in _named(maker.function):
            _seed(env, name, first + index)
        return GuardedEnv(env, name=name, seed=first + index, index=index)

    count = offered["num_envs"]
    # One function with arguments: TorchRL would treat N functions as N different kinds of environment.
    batch = SerialEnv(count, make, create_env_kwargs=[{"index": i} for i in range(count)])
    batch.start()  # otherwise its members are created at the first reset
    return batch


def _seed(env: EnvBase, name: str, seed: int) -> None:
    """Seed an environment whose maker has no parameter ``seed``."""
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
