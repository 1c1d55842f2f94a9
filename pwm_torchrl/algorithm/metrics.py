"""Metrics of an epoch, collected as detached numbers.

Nothing that outlives a step may own an autograd graph: a logged loss that kept its graph once cost a run 128 GB of host
memory. A tensor that requires grad is therefore refused here instead of being detached in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["MetricRow", "Number"]

Number = int | float


class MetricRow:
    """One row of metrics while an epoch fills it.

    :meth:`set` keeps the last value, :meth:`mean` averages over the calls. Tensors stay on their device until
    :meth:`numbers`, so that collecting does not wait for the accelerator at every update.

    Examples:
        >>> from pwm_torchrl.algorithm.metrics import MetricRow
        >>> row = MetricRow()
        >>> row.set({"epoch": 3})
        >>> for loss in (1.0, 3.0):
        ...     row.mean({"model": loss}, prefix="loss/")
        >>> row.numbers()
        {'epoch': 3, 'loss/model': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def set(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Stores values, replacing earlier ones of the same name.

        Args:
            values: numbers or tensors with one element and no gradient; a TensorDict of such works too.
            prefix: put in front of each name. Defaults to ``""``.

        Raises:
            ValueError: if a tensor requires grad or has more than one element.
            TypeError: if a value is not a number.
        """
        for name, value in values.items():
            key = prefix + name
            self._sums[key] = _check(key, value)
            self._counts[key] = 1

    def mean(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds values to the running mean of their names; takes and raises what :meth:`set` does."""
        for name, value in values.items():
            key = prefix + name
            checked = _check(key, value)
            self._sums[key] = self._sums[key] + checked if key in self._sums else checked
            self._counts[key] = self._counts.get(key, 0) + 1

    def numbers(self) -> dict[str, Number]:
        """The row as plain Python numbers, in the order in which the names appeared."""
        totals = _on_host(self._sums)
        return {key: total if self._counts[key] == 1 else total / self._counts[key] for key, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """The row as far as it is filled, to the bit."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], device: Any = None) -> MetricRow:
        """A row as :meth:`state_dict` gave it, its tensors on ``device``."""
        row = cls()
        row._sums = {
            k: v.to(device) if isinstance(v, Tensor) and device is not None else v
            for k, v in state_dict["sums"].items()
        }
        row._counts = dict(state_dict["counts"])
        return row


def _check(name: str, value: Any) -> Any:
    """The value itself, or its detached tensor, after refusing what must not be kept."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"metric {name!r} requires grad and would keep its autograd graph alive; detach it where it is made"
            )
        if value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a metric is one number")
        # A copy: the caller may overwrite its tensor in place before the row is read.
        return value.reshape(()).clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}; a metric is one number")
    return int(value) if isinstance(value, Integral) else float(value)


def _on_host(values: Mapping[str, Any]) -> dict[str, Number]:
    """Values as Python numbers; the tensors of a device and dtype are copied together, since each copy waits."""
    together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            together.setdefault((value.device, value.dtype), []).append(key)
    numbers = dict(values)
    for keys in together.values():
        numbers.update(zip(keys, torch.stack([values[key] for key in keys]).cpu().tolist(), strict=True))
    return numbers
