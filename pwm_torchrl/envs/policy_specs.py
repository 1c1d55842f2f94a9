"""How a policy reads and acts in an environment: names, shapes, and the range of its actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs import EnvBase, TransformedEnv

from pwm_torchrl.envs.info import env_info, env_layers
from pwm_torchrl.envs.transforms import OwnUnits
from pwm_torchrl.errors import ConfigurationError

__all__ = ["PolicySpecs", "action_range", "in_own_units", "policy_specs"]


@dataclass(frozen=True)
class PolicySpecs:
    """What a policy reads and writes.

    Attributes:
        observation_keys: entries that make up the observation, in order.
        feature_dims: how many last dimensions of each of them are features, 0 for a single number.
        action_key: entry of the action.
        low: smallest action ``[A]``, float32.
        high: largest action ``[A]``, float32.
        action_dtype: of the action.
    """

    observation_keys: tuple[NestedKey, ...]
    feature_dims: tuple[int, ...]
    action_key: NestedKey
    low: Tensor
    high: Tensor
    action_dtype: torch.dtype = torch.float32

    @classmethod
    def standard(cls, low: Sequence[float], high: Sequence[float]) -> PolicySpecs:
        """``observation`` -> ``action`` in a range."""
        return cls(("observation",), (1,), "action", torch.tensor(low), torch.tensor(high))


def policy_specs(
    env: EnvBase,
    observation_dim: int,
    action_dim: int,
    observation_keys: Sequence[NestedKey] | None = None,
) -> PolicySpecs:
    """The interface of any environment in which a policy of given dimensions can act.

    The observation is the entry ``"observation"`` if it has the policy's length, otherwise all entries together.

    Args:
        env (EnvBase): the environment, of any batch size.
        observation_dim (int): numbers that the policy reads.
        action_dim (int): numbers that it acts with.
        observation_keys (sequence of NestedKey, optional): entries that the policy was trained on, in order; they are
            preferred where ``env`` has them. Defaults to ``None``.

    Raises:
        ConfigurationError: if the policy does not fit.
    """
    if not isinstance(env, EnvBase):
        raise ConfigurationError(
            f"env is a {type(env).__name__} and not a TorchRL environment: wrap it, torchrl.envs.GymWrapper(env)"
        )
    name = _name(env)
    entries = _entries(env, name, observation_dim, observation_keys)
    low, high, dtype = _actions(env, name, action_dim)
    return PolicySpecs(tuple(entries), tuple(entries.values()), env.action_key, low, high, dtype)


def _name(env: EnvBase) -> str:
    try:
        return env_info(env).name
    except TypeError:  # not made by this package
        return type(env).__name__


def _entries(env: EnvBase, name: str, dim: int, chosen: Sequence[NestedKey] | None) -> dict[NestedKey, int]:
    """The observation's entries, and the number of feature dimensions of each."""
    leaves = {
        key: spec.shape[len(env.batch_size) :]
        for key, spec in env.observation_spec.items(True, True)
        if _is_numbers(spec) and key != "step_count"  # TorchRL's StepCounter adds it; the clock is no observation
    }
    wanted = [tuple(key) if not isinstance(key, str) else key for key in chosen or []]
    ours = any("pwm_info" in layer.__dict__ for layer in env_layers(env))  # its "observation" has them all already
    for keys in ([] if ours else wanted, ["observation"], list(leaves)):
        if keys and all(key in leaves for key in keys) and sum(leaves[key].numel() for key in keys) == dim:
            return {key: len(leaves[key]) for key in keys}
    seen = ", ".join(f"{key!r} {list(shape)}" for key, shape in leaves.items()) or "no numbers"
    raise ConfigurationError(
        f"{name} observes {seen}, and the policy reads {dim} numbers: give an environment of the run's own kind, as "
        "pwm_torchrl.load_env(run) makes"
    )


def _is_numbers(spec: TensorSpec) -> bool:
    return not isinstance(spec, Composite) and spec.dtype is not None


def _actions(env: EnvBase, name: str, dim: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Range ``[A]`` and dtype of the action."""
    keys = list(env.action_keys)
    if len(keys) != 1:
        raise ConfigurationError(f"{name} has the action entries {keys}, and the policy writes exactly one")
    spec = env.full_action_spec[keys[0]]
    if not spec.dtype.is_floating_point:
        raise ConfigurationError(f"{name} has discrete actions ({spec.dtype}), and the policy's are continuous")
    shape = spec.shape[len(env.batch_size) :]
    if shape != (dim,):
        raise ConfigurationError(
            f"{name} has actions of shape {list(shape)}, and the policy's are [{dim}]: give an environment of the "
            "run's own kind, as pwm_torchrl.load_env(run) makes"
        )
    if not isinstance(spec, Bounded):
        raise ConfigurationError(f"{name} has an unbounded action range: give its action_spec a low and a high")
    low, high = action_range(env)
    if not (torch.isfinite(low) & torch.isfinite(high) & (low < high)).all():
        raise ConfigurationError(
            f"{name} has the action range {low.tolist()} to {high.tolist()}: actions are scaled to it, so every "
            "dimension needs finite, different bounds (give its action_spec a low and a high)"
        )
    return low, high, spec.dtype


def action_range(env: EnvBase) -> tuple[Tensor, Tensor]:
    """Smallest and largest action ``[A]`` of the first of a batch of environments, float32."""
    first = (0,) * len(env.batch_size)
    space = env.full_action_spec[env.action_key].space
    return space.low[first].float().cpu(), space.high[first].float().cpu()


def in_own_units(env: EnvBase) -> EnvBase:
    """An environment of :func:`~pwm_torchrl.envs.make_env` with actions in its simulator's range instead of [-1, 1].

    It takes the place of ``env``, which must not be used any more.
    """
    info = env_info(env)
    low, high = (torch.tensor(bound, device=env.device) for bound in (info.action_low, info.action_high))
    if (low == -1).all() and (high == 1).all():
        return env
    transform = OwnUnits(low, high)
    if isinstance(env, TransformedEnv):  # two of them inside each other cannot draw random actions
        return env.append_transform(transform)
    return TransformedEnv(env, transform)
