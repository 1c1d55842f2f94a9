"""The standard interface of environments: facts, actions in [-1, 1], float32 observations, a time limit; its checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import is_seq_of_nested_key
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import ActionScaling, Compose, DoubleToFloat, StepCounter, Transform

from pwm_torchrl.errors import ConfigurationError, EnvironmentFault

__all__ = [
    "CompleteDone",
    "EnvInfo",
    "FlatObservation",
    "GuardedEnv",
    "OwnUnits",
    "PolicySpecs",
    "action_range",
    "check_maker_arguments",
    "check_usable",
    "env_info",
    "env_layers",
    "in_own_units",
    "policy_specs",
    "standardize",
]

# Facts that training, tables and reports use --------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvInfo:
    """Facts of an environment.

    Attributes:
        name: label for tables and messages.
        observation_dim: length of the flat observation.
        action_dim: length of the action.
        episode_length: agent steps after which an episode is truncated, ``None`` if there is no limit.
        action_repeat: environment steps per agent step.
        num_envs: size of the batch.
        terminates: whether an episode can end by termination, in addition to its time limit.
        seed: seed of sub-environment 0; sub-environment i has ``seed + i``.
        action_dims: length of the action in each task, for several tasks that are padded to the widest one; empty for a
            single task.
        action_low: smallest action in the simulator's units, which is scaled to -1; empty if it is not known without
            creating the environment.
        action_high: largest action in the simulator's units, which is scaled to 1; empty in the same case.
        simulator: the :class:`~pwm_torchrl.envs.differentiable.Simulator` of a differentiable environment.
    """

    name: str
    observation_dim: int
    action_dim: int
    episode_length: int | None
    action_repeat: int
    num_envs: int
    terminates: bool
    seed: int = 0
    action_dims: tuple[int, ...] = ()
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    simulator: Any = field(default=None, compare=False, repr=False)


def env_layers(env: Any) -> Iterator[Any]:
    """``env`` and the environments inside TorchRL's transforms, outermost first; does not enter batches."""
    while env is not None:
        yield env
        env = env.base_env if isinstance(env, TransformedEnv) else None


def env_info(env: EnvBase) -> EnvInfo:
    """Facts of an environment made by :func:`~pwm_torchrl.envs.make_env` or one of the makers.

    Args:
        env (EnvBase): the environment, possibly inside further transforms.

    Returns:
        EnvInfo: its facts.

    Raises:
        TypeError: if the environment was not made by this package.
    """
    for layer in env_layers(env):
        info = layer.__dict__.get("pwm_info")
        if info is not None:
            return info
    raise TypeError(
        f"{type(env).__name__} was not made by pwm_torchrl.envs: pass it through pwm_torchrl.envs.standardize first"
    )


# The interface --------------------------------------------------------------------------------------------------------


def check_maker_arguments(num_envs: int, action_repeat: int, episode_length: int | None) -> None:
    """Raise ConfigurationError unless the values are positive integers (``episode_length`` may be ``None``)."""
    for key, value in (("num_envs", num_envs), ("action_repeat", action_repeat), ("episode_length", episode_length)):
        if key == "episode_length" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"env.{key}={value!r} must be an integer of at least 1")


class FlatObservation(Transform):
    """Flattens entries, casts them to float32 and concatenates them as ``"observation"``.

    The entries themselves are kept, because stateless environments read them at the next step.

    Args:
        in_keys (sequence of NestedKey): entries, in the order of concatenation.
    """

    def __init__(self, in_keys: Sequence[NestedKey]) -> None:
        if not is_seq_of_nested_key(list(in_keys)):
            raise ValueError(f"in_keys={in_keys!r} must be a sequence of keys")
        super().__init__(in_keys=list(in_keys), out_keys=["observation"])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        pieces = [next_tensordict.get(key).reshape(*batch, -1).to(torch.float32) for key in self.in_keys]
        return next_tensordict.set("observation", torch.cat(pieces, -1))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        batch = observation_spec.shape
        length = sum(observation_spec[key].shape[len(batch) :].numel() for key in self.in_keys)
        observation_spec["observation"] = Unbounded(
            (*batch, length), dtype=torch.float32, device=observation_spec.device
        )
        return observation_spec


class CompleteDone(Transform):
    """Adds the ``"truncated"`` entry to environments that only have ``"done"`` and ``"terminated"``."""

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        if "truncated" not in next_tensordict.keys():
            done = next_tensordict.get("done")
            next_tensordict.set("truncated", done & ~next_tensordict.get("terminated", done))
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset) if "done" in tensordict_reset.keys() else tensordict_reset

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        if "truncated" not in done_spec.keys():
            done = done_spec["done"]
            done_spec["truncated"] = Categorical(2, dtype=torch.bool, shape=done.shape, device=done.device)
        return done_spec


class OwnUnits(Transform):
    """Accepts actions in a given range and scales them to [-1, 1] for the environment inside.

    The inverse of TorchRL's :class:`~torchrl.envs.transforms.ActionScaling`, for environments that contain it.

    Args:
        low (Tensor): smallest action ``[A]``.
        high (Tensor): largest action ``[A]``.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(in_keys_inv=["action"], out_keys_inv=["action"])
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def _inv_apply_transform(self, action: Tensor) -> Tensor:
        return (action - (self.high + self.low) / 2) / ((self.high - self.low) / 2)

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        spec = input_spec["full_action_spec", "action"]
        low, high = (bound.expand(spec.shape).clone() for bound in (self.low, self.high))
        input_spec["full_action_spec", "action"] = Bounded(low, high, spec.shape, spec.device, spec.dtype)
        return input_spec


class GuardedEnv(TransformedEnv):
    """A transformed environment that turns exceptions and non-finite values into :class:`EnvironmentFault`.

    Args:
        env (EnvBase): the environment.
        transform (Transform, optional): as for ``TransformedEnv``. Defaults to ``None``.
        name (str): name for error messages.
        seed (int): seed of its first row.
        index (int, optional): its position in a batch, if it is a member of one. Defaults to ``None``.
    """

    def __init__(self, env: EnvBase, transform: Any = None, *, name: str, seed: int, index: int | None = None) -> None:
        super().__init__(env, transform)
        self.guard = (name, seed, index)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        try:
            out = super()._step(tensordict)
        except Exception as error:
            raise self._fault("step", error) from error
        self._check(out, "step")
        return out

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        try:
            out = super()._reset(tensordict, **kwargs)
        except Exception as error:
            raise self._fault("reset", error) from error
        self._check(out, "reset")
        return out

    def _fault(self, where: str, error: Exception) -> Exception:
        if isinstance(error, (EnvironmentFault, ConfigurationError)):
            return error
        name, seed, index = self.guard
        text = " ".join(str(error).split())[:300]
        return EnvironmentFault(name, f"{where} raised {type(error).__name__}: {text}", seed=seed, index=index)

    def _check(self, tensordict: TensorDictBase, where: str) -> None:
        for key in ("observation", "reward"):
            value = tensordict.get(key, None)
            if value is None or not value.is_floating_point() or torch.isfinite(value).all():
                continue
            name, seed, index = self.guard
            if index is None and self.batch_size:
                index = int((~torch.isfinite(value).flatten(1).all(1)).nonzero()[0])
                seed += index
            raise EnvironmentFault(name, f"{key} is not finite after a {where}", seed=seed, index=index)


@dataclass(frozen=True)
class PolicySpecs:
    """Entries that a policy reads and writes.

    Attributes:
        observation_keys: entries that form the observation, in order.
        feature_dims: number of trailing feature dimensions of each of them, 0 for a single number.
        action_key: entry of the action.
        low: smallest action ``[A]``, float32.
        high: largest action ``[A]``, float32.
        action_dtype: dtype of the action.
    """

    observation_keys: tuple[NestedKey, ...]
    feature_dims: tuple[int, ...]
    action_key: NestedKey
    low: Tensor
    high: Tensor
    action_dtype: torch.dtype = torch.float32

    @classmethod
    def standard(cls, low: Sequence[float], high: Sequence[float]) -> PolicySpecs:
        """Specs of a policy that reads ``observation`` and writes ``action`` in a range."""
        return cls(("observation",), (1,), "action", torch.tensor(low), torch.tensor(high))


def policy_specs(
    env: EnvBase,
    observation_dim: int,
    action_dim: int,
    observation_keys: Sequence[NestedKey] | None = None,
) -> PolicySpecs:
    """Specs for a policy of given dimensions in any environment.

    The observation is the entry ``"observation"`` if it has the policy's length, otherwise all entries together.

    Args:
        env (EnvBase): the environment, of any batch size.
        observation_dim (int): length of the policy's observation.
        action_dim (int): length of the policy's action.
        observation_keys (sequence of NestedKey, optional): entries that the policy was trained on, in order; preferred
            if ``env`` has them. Defaults to ``None``.

    Raises:
        ConfigurationError: if the policy does not fit the environment.
    """
    if not isinstance(env, EnvBase):
        raise ConfigurationError(
            f"env is a {type(env).__name__} and not a TorchRL environment: wrap it with torchrl.envs.GymWrapper(env)"
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
        if _is_numbers(spec) and key != "step_count"  # added by TorchRL's StepCounter, not an observation
    }
    wanted = [tuple(key) if not isinstance(key, str) else key for key in chosen or []]
    # The "observation" of an environment of this package already contains all entries.
    ours = any("pwm_info" in layer.__dict__ for layer in env_layers(env))
    for keys in ([] if ours else wanted, ["observation"], list(leaves)):
        if keys and all(key in leaves for key in keys) and sum(leaves[key].numel() for key in keys) == dim:
            return {key: len(leaves[key]) for key in keys}
    seen = ", ".join(f"{key!r} {list(shape)}" for key, shape in leaves.items()) or "no numbers"
    raise ConfigurationError(
        f"{name} observes {seen}, but the policy reads {dim} numbers: use an environment like that of the run, for "
        "example pwm_torchrl.load_env(run)"
    )


def _is_numbers(spec: TensorSpec) -> bool:
    return not isinstance(spec, Composite) and spec.dtype is not None


def _actions(env: EnvBase, name: str, dim: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Range ``[A]`` and dtype of the action."""
    keys = list(env.action_keys)
    if len(keys) != 1:
        raise ConfigurationError(f"{name} has the action entries {keys}, but the policy writes exactly one")
    spec = env.full_action_spec[keys[0]]
    if not spec.dtype.is_floating_point:
        raise ConfigurationError(f"{name} has discrete actions ({spec.dtype}), but the policy's are continuous")
    shape = spec.shape[len(env.batch_size) :]
    if shape != (dim,):
        raise ConfigurationError(
            f"{name} has actions of shape {list(shape)}, but the policy's are [{dim}]: use an environment like that of "
            "the run, for example pwm_torchrl.load_env(run)"
        )
    if not isinstance(spec, Bounded):
        raise ConfigurationError(f"{name} has an unbounded action range: set low and high in its action_spec")
    low, high = action_range(env)
    if not (torch.isfinite(low) & torch.isfinite(high) & (low < high)).all():
        raise ConfigurationError(
            f"{name} has the action range {low.tolist()} to {high.tolist()}: actions are scaled to it, so every "
            "dimension needs finite, different bounds (set low and high in its action_spec)"
        )
    return low, high, spec.dtype


def action_range(env: EnvBase) -> tuple[Tensor, Tensor]:
    """Smallest and largest action ``[A]`` of the first of a batch of environments, float32."""
    first = (0,) * len(env.batch_size)
    space = env.full_action_spec[env.action_key].space
    return space.low[first].float().cpu(), space.high[first].float().cpu()


def in_own_units(env: EnvBase) -> EnvBase:
    """Convert an environment of :func:`~pwm_torchrl.envs.make_env` to actions in its simulator's range.

    It replaces ``env``, which must not be used afterwards.
    """
    info = env_info(env)
    low, high = (torch.tensor(bound, device=env.device) for bound in (info.action_low, info.action_high))
    if (low == -1).all() and (high == 1).all():
        return env
    transform = OwnUnits(low, high)
    if isinstance(env, TransformedEnv):  # nested TransformedEnvs cannot draw random actions
        return env.append_transform(transform)
    return TransformedEnv(env, transform)


def standardize(
    env: EnvBase,
    *,
    name: str,
    seed: int = 0,
    episode_length: int | None = None,
    terminates: bool | None = None,
    observation_keys: Sequence[NestedKey] | None = None,
) -> EnvBase:
    """Give an environment the standard interface; environments of this package are returned unchanged.

    Args:
        env (EnvBase): any TorchRL environment of batch size ``[N]``.
        name (str): label for tables and messages.
        seed (int): seed of its first row. Defaults to ``0``.
        episode_length (int, optional): number of agent steps after which episodes are truncated. Defaults to ``None``:
            the environment's own limit, if any.
        terminates (bool, optional): whether episodes can terminate, in addition to truncation. Defaults to ``None``,
            meaning that they can.
        observation_keys (sequence of NestedKey, optional): entries that form the observation, in order. Defaults to
            ``None``, all of them.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, ``action`` float32 ``[N, A]`` in [-1, 1], ``reward`` float32
        ``[N, 1]``, ``done``, ``terminated`` and ``truncated`` bool ``[N, 1]``.

    Raises:
        ConfigurationError: for discrete or unbounded actions, image observations, or entries with other names.
    """
    if any("pwm_info" in layer.__dict__ for layer in env_layers(env)):
        return env
    if len(env.batch_size) != 1:
        raise ConfigurationError(f"{name} has batch size {list(env.batch_size)}; one batch dimension is needed")
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
    """Raise ConfigurationError if PWM cannot learn from the specs of ``env``.

    Args:
        env (EnvBase): environment of any batch size.
        name (str): label for messages.
        observation_keys (sequence of NestedKey, optional): as for :func:`standardize`. Defaults to ``None``.

    Returns:
        list of NestedKey: the entries that form the observation, in order.
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
                f"{name} has the {kind} entries {list(keys)}; only a single entry {wanted!r} is supported"
            )
    if "done" not in env.done_keys:
        raise ConfigurationError(f"{name} has the done entries {list(env.done_keys)}; an entry 'done' is needed")


def _check_actions(env: EnvBase, name: str) -> None:
    spec = env.action_spec
    if not spec.dtype.is_floating_point:
        raise ConfigurationError(
            f"{name} has discrete actions ({type(spec).__name__}, {spec.dtype}): PWM differentiates through actions, "
            "so only continuous ones are supported (env._target_)"
        )
    if spec.ndim != len(env.batch_size) + 1:
        raise ConfigurationError(f"{name} has actions of shape {list(spec.shape)}; one vector per row is needed")
    if not isinstance(spec, Bounded) or not _finite(spec):
        raise ConfigurationError(
            f"{name} has an unbounded action range: actions are scaled from [-1, 1], so every dimension needs "
            "finite bounds (set low and high in its action_spec)"
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
    leaves.pop("step_count", None)  # added by TorchRL's StepCounter, not an observation
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
            "(select entries with env.observation_keys)"
        )
    if spec.dtype is None or isinstance(spec, Composite):
        raise ConfigurationError(
            f"{name} observes {key!r}, which is not a tensor (select entries with env.observation_keys)"
        )


def _is_flat_float(spec: TensorSpec) -> bool:
    return spec.ndim == 2 and spec.dtype == torch.float32


def _cast_reward(env: EnvBase) -> list[Any]:
    return [DoubleToFloat(in_keys=["reward"])] if env.reward_spec.dtype == torch.float64 else []


def _scale_actions(env: EnvBase) -> list[Any]:
    """Affine map from [-1, 1]. Inverse transforms run from last to first, so the cast to float64 comes before it."""
    spec = env.action_spec
    transforms: list[Any] = []
    if not ((spec.space.low == -1).all() and (spec.space.high == 1).all()):
        transforms.append(ActionScaling())
    if spec.dtype == torch.float64:
        transforms.append(DoubleToFloat(in_keys_inv=["action"]))
    return transforms


def _simulators(env: EnvBase) -> list[Any]:
    """The environment, its inner environments (the first of a batch) and the simulators that TorchRL wraps."""
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
