"""Checks and completes an environment from anywhere, so that training meets one interface only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.transforms import ActionScaling, Compose, DoubleToFloat, StepCounter

from pwm_torchrl.envs.info import EnvInfo, env_layers
from pwm_torchrl.envs.policy_specs import action_range
from pwm_torchrl.envs.transforms import CompleteDone, FlatObservation, GuardedEnv
from pwm_torchrl.errors import ConfigurationError

__all__ = ["check_usable", "standardize"]


def standardize(
    env: EnvBase,
    *,
    name: str,
    seed: int = 0,
    episode_length: int | None = None,
    terminates: bool | None = None,
    observation_keys: Sequence[NestedKey] | None = None,
) -> EnvBase:
    """An environment with the interface of this package's own, which pass through unchanged.

    Args:
        env (EnvBase): any TorchRL environment of batch size ``[N]``.
        name (str): label for tables and messages.
        seed (int): seed of its first row. Defaults to ``0``.
        episode_length (int, optional): truncate after so many agent steps. Defaults to ``None``: the environment
            limits itself, or not at all.
        terminates (bool, optional): whether episodes can end otherwise than by truncation. Defaults to ``None``:
            they can.
        observation_keys (sequence of NestedKey, optional): entries that make up the observation, in order. Defaults
            to ``None``: all of them.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, ``action`` float32 ``[N, A]`` in [-1, 1], ``reward`` float32
        ``[N, 1]``, ``done``, ``terminated`` and ``truncated`` bool ``[N, 1]``.

    Raises:
        ConfigurationError: for discrete or unbounded actions, image observations, or entries under other names.
    """
    if any("pwm_info" in layer.__dict__ for layer in env_layers(env)):
        return env
    if len(env.batch_size) != 1:
        raise ConfigurationError(f"{name} has batch size {list(env.batch_size)}: one batch dimension is needed")
    keys = check_usable(env, name, observation_keys)

    transforms: list[Any] = []
    if episode_length is not None:
        transforms.append(StepCounter(max_steps=episode_length))
    transforms += [CompleteDone(), *_cast_reward(env), *_scale_actions(env)]
    if list(keys) != ["observation"] or not _is_flat_float(env.observation_spec["observation"]):
        transforms.append(FlatObservation(keys))
    result = GuardedEnv(env, Compose(*transforms), name=name, seed=seed)
    low, high = action_range(env)
    result.pwm_info = EnvInfo(
        name=name,
        observation_dim=result.observation_spec["observation"].shape[-1],
        action_dim=result.action_spec.shape[-1],
        episode_length=episode_length or _own_episode_length(env),
        action_repeat=_own_action_repeat(env),
        num_envs=env.batch_size[0],
        terminates=True if terminates is None else terminates,
        seed=seed,
        action_low=tuple(low.tolist()),
        action_high=tuple(high.tolist()),
    )
    return result


def check_usable(env: EnvBase, name: str, observation_keys: Sequence[NestedKey] | None = None) -> list[NestedKey]:
    """Raise ConfigurationError unless the specs of ``env`` are ones that PWM can learn from.

    Args:
        env (EnvBase): environment of any batch size.
        name (str): label for messages.
        observation_keys (sequence of NestedKey, optional): as for :func:`standardize`. Defaults to ``None``.

    Returns:
        list of NestedKey: the entries that make up the observation, in order.
    """
    _check_entries(env, name)
    _check_actions(env, name)
    return _observation_keys(env, name, observation_keys)


def _check_entries(env: EnvBase, name: str) -> None:
    for kind, keys, wanted in (
        ("action", env.action_keys, "action"),
        ("reward", env.reward_keys, "reward"),
    ):
        if list(keys) != [wanted]:
            raise ConfigurationError(
                f"{name} has the {kind} entries {list(keys)}: exactly one called {wanted!r} is supported"
            )
    if "done" not in env.done_keys:
        raise ConfigurationError(f"{name} has the done entries {list(env.done_keys)}: one called 'done' is needed")


def _check_actions(env: EnvBase, name: str) -> None:
    spec = env.action_spec
    if not spec.dtype.is_floating_point:
        raise ConfigurationError(
            f"{name} has discrete actions ({type(spec).__name__}, {spec.dtype}): PWM differentiates through actions, "
            "so only continuous ones are supported (env._target_)"
        )
    if spec.ndim != len(env.batch_size) + 1:
        raise ConfigurationError(f"{name} has actions of shape {list(spec.shape)}: one vector each is needed")
    if not isinstance(spec, Bounded) or not _finite(spec):
        raise ConfigurationError(
            f"{name} has an unbounded action range: actions are scaled from [-1, 1], so every dimension needs "
            "finite bounds (give its action_spec a low and a high)"
        )


def _finite(spec: Bounded) -> bool:
    low, high = spec.space.low, spec.space.high
    return bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all())


def _observation_keys(env: EnvBase, name: str, chosen: Sequence[NestedKey] | None) -> list[NestedKey]:
    leaves = dict(env.observation_spec.items(True, True))
    if chosen is not None:
        wanted = [tuple(key) if not isinstance(key, str) else key for key in chosen]
        missing = [key for key in wanted if key not in leaves]
        if missing:
            raise ConfigurationError(
                f"env.observation_keys names {missing[0]!r}, but {name} observes {', '.join(map(str, leaves))}"
            )
        leaves = {key: leaves[key] for key in wanted}
    leaves.pop("step_count", None)  # TorchRL's StepCounter adds it; the clock is no observation
    if not leaves:
        raise ConfigurationError(f"{name} has no observation entry")
    for key, spec in leaves.items():
        _check_observation(name, key, spec, len(env.batch_size))
    return list(leaves)


def _check_observation(name: str, key: NestedKey, spec: TensorSpec, batch_dims: int) -> None:
    shape = list(spec.shape[batch_dims:])
    last = key if isinstance(key, str) else key[-1]
    if len(shape) >= 3 or (len(shape) == 2 and spec.dtype == torch.uint8) or last == "pixels":
        raise ConfigurationError(
            f"{name} observes images ({key!r}, shape {shape}): only vectors of numbers are supported "
            "(choose entries by env.observation_keys)"
        )
    if spec.dtype is None or isinstance(spec, Composite):
        raise ConfigurationError(
            f"{name} observes {key!r}, which is not a tensor (choose entries by env.observation_keys)"
        )


def _is_flat_float(spec: TensorSpec) -> bool:
    return spec.ndim == 2 and spec.dtype == torch.float32


def _cast_reward(env: EnvBase) -> list[Any]:
    return [DoubleToFloat(in_keys=["reward"])] if env.reward_spec.dtype == torch.float64 else []


def _scale_actions(env: EnvBase) -> list[Any]:
    """Affine map from [-1, 1]; inverse transforms run last to first, so the cast to float64 comes before it."""
    spec = env.action_spec
    transforms: list[Any] = []
    if not ((spec.space.low == -1).all() and (spec.space.high == 1).all()):
        transforms.append(ActionScaling())
    if spec.dtype == torch.float64:
        transforms.append(DoubleToFloat(in_keys_inv=["action"]))
    return transforms


def _simulators(env: EnvBase) -> list[Any]:
    """What is inside: the first member of a batch and what TorchRL's wrappers wrap."""
    found: list[Any] = []
    queue: list[Any] = [env]
    while queue:
        layer = queue.pop()
        found.append(layer)
        if isinstance(layer, EnvBase):
            queue += list(env_layers(layer))[1:2]
            queue += list(layer.__dict__.get("_envs", None) or [])[:1]
            queue += [layer.__dict__["_env"]] if layer.__dict__.get("_env") is not None else []
    return found


def _own_action_repeat(env: EnvBase) -> int:
    repeats = [layer.__dict__.get("wrapper_frame_skip") for layer in _simulators(env) if isinstance(layer, EnvBase)]
    return max([repeat for repeat in repeats if isinstance(repeat, int)] or [1])


def _own_episode_length(env: EnvBase) -> int | None:
    for layer in _simulators(env):
        if isinstance(layer, EnvBase):
            continue
        limit = getattr(getattr(layer, "spec", None), "max_episode_steps", None)
        if isinstance(limit, int):
            return -(-limit // _own_action_repeat(env))
    return None
