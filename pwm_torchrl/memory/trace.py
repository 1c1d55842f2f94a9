"""Peak memory of a function of tensors, found by running it on tensors without data.

Under :class:`~torch._subclasses.fake_tensor.FakeTensorMode` every operation computes shapes only. A dispatch mode sees
each storage that an operation makes, and a finalizer sees it go, so that the bytes alive at any moment are those of the
real run: what autograd saves, what a backward pass needs beside it and what is freed early are counted, not modelled.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still alive, on real tensors or fake ones.

    Attributes:
        live (int): bytes now.
        peaks (list of int): highest ``live`` of each phase since :meth:`begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peaks = [0]
        self._known: dict[int, weakref.finalize] = {}

    @property
    def peak(self) -> int:
        """Highest :attr:`live` since :meth:`begin`."""
        return max(self.peaks)

    def begin(self) -> int:
        """Forget earlier peaks; returns the bytes alive now."""
        self.peaks = [self.live]
        return self.live

    def next_phase(self) -> None:
        """From now on, a peak of its own is noted."""
        self.peaks.append(self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks more often than it computes
        if func is _ITEM and isinstance(args[0], FakeTensor):
            # Initialisers that repeat until no sample lies outside their range ask for one number; "none does" ends it.
            return False
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._see(out.untyped_storage())
            return out
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        finalizer = weakref.finalize(storage, self._gone, key, size)
        finalizer.atexit = False
        self._known[key] = finalizer
        self.live += size
        self.peaks[-1] = max(self.peaks[-1], self.live)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class FakeTensors:
    """Inside ``with``, tensors have shapes and no data, and :attr:`counter` counts their storages.

    Can be entered again; modules made inside have parameters without data and are of use only there.
    """

    def __init__(self) -> None:
        self.counter = StorageCounter()
        self._mode = FakeTensorMode()

    def __enter__(self) -> StorageCounter:
        self._mode.__enter__()
        self.counter.__enter__()
        return self.counter

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.counter.__exit__(kind, error, trace)
        self._mode.__exit__(kind, error, trace)
