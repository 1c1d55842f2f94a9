"""TorchRL transforms that bring a foreign environment to the interface of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import is_seq_of_nested_key
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import Transform

from pwm_torchrl.errors import ConfigurationError, EnvironmentFault

__all__ = ["CompleteDone", "FlatObservation", "GuardedEnv", "OwnUnits"]


class FlatObservation(Transform):
    """Flattens entries, casts them to float32 and concatenates them as ``"observation"``.

    The entries themselves stay: environments without a state of their own read them back at the next step.

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
    """Adds the ``"truncated"`` entry to environments that know only ``"done"`` and ``"terminated"``."""

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
    """Takes actions in a range, and hands them on scaled to [-1, 1].

    The opposite of TorchRL's :class:`~torchrl.envs.transforms.ActionScaling`, for environments that have it inside.

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
        name (str): name for the message.
        seed (int): seed of its first row.
        index (int, optional): its position, where it is itself one of a batch. Defaults to ``None``.
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
