"""CUDA tensors without a GPU: they have shapes and a device, but no data; and what would make the host wait for one.

:class:`torch._subclasses.FakeTensorMode` computes devices and shapes of all operations and refuses those that mix
devices. A build of PyTorch without CUDA can run autograd on such tensors if its own C++ code, which wants to switch to
a tensor's device, does not see the CUDA device; :class:`FakeCuda` takes care of that.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

AnyModule = TypeVar("AnyModule", bound=nn.Module)

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
META = torch.device("meta")
#: Where the package is not on the stack.
ELSEWHERE = "outside the package"
PACKAGE = Path(__file__).parents[1] / "pwm_torchrl"

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
#: Operations whose result on the host is a number of the device's data.
_NUMBERS = (
    _aten._local_scalar_dense.default,
    _aten.allclose.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
)
#: Operations whose result has a size that depends on the device's data.
_SIZES = (
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class SizeUnknown(RuntimeError):
    """An operation on a GPU that is not there has a result of a size that only its data could tell."""


class _OneMode(FakeTensorMode):
    """Copies of its tensors stay its own: ``deepcopy`` of a tensor would copy its mode, too."""

    def __deepcopy__(self, memo: Any) -> _OneMode:
        return self


class _Functions(TorchFunctionMode):
    """What no dispatch mode sees.

    ``a.data = b`` gives ``a`` the device of ``b``, as it does to a tensor that is not fake; numbers of Python become a
    tensor on the GPU by a copy.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = torch.device(kwargs.get("device") or CPU)
        if func in (torch.tensor, torch.as_tensor) and device.type == "cuda" and not isinstance(args[0], Tensor):
            return func(*args, **{**kwargs, "device": CPU}).to(device)
        out = func(*args, **kwargs)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].fake_device = args[1].fake_device
        return out


class FakeCuda(TorchDispatchMode):
    """Context manager: tensors are fake, on the CPU or on ``cuda:0``, and what makes the host wait is recorded.

    A copy to the GPU that is not asynchronous waits for everything that was given to the GPU before, as a copy from it
    does.

    Attributes:
        waits (list of str): operation and, innermost last, the lines of the package that led to it.
        operations (Counter): calls of every operation of CUDA tensors, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations: Counter[str] = Counter()
        self._fake = _OneMode(allow_non_fake_inputs=False)
        self._functions = _Functions()

    def __enter__(self) -> FakeCuda:
        self._fake.__enter__()
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        self._fake.__exit__(*error)

    def begin(self) -> None:
        """Forget what was recorded."""
        self.waits.clear()
        self.operations.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _DEVICE and isinstance(args[0], FakeTensor) and args[0].fake_device.type == "cuda":
            return META  # the question is C++'s; Python reads FakeTensor.device
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA  # C++ asks for a tensor where another one is
        first = args[0] if args and isinstance(args[0], (list, tuple)) else args
        if any(map(on_cuda, first)):
            self.operations[func.__name__] += 1
        sized = size_depends_on_data(func, args)
        if sized or waits(func, args, kwargs):
            self.waits.append(f"{func.__name__}: {package_lines()}")
        if sized:
            raise SizeUnknown(self.waits[-1])
        if func is _aten._pin_memory.default:
            return args[0].clone()  # pinned, for all that shapes and devices can tell
        if func in _NUMBERS:  # there are none; any will do
            return 0.0 if func is _aten._local_scalar_dense.default and args[0].is_floating_point() else 0
        out = func(*args, **kwargs)
        if isinstance(out, FakeTensor):
            out.constant = None  # of torch.tensor: with it, operations are carried out where there is no GPU
        return out


def on_cuda(value: Any) -> bool:
    """Whether ``value`` is a tensor on the GPU."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def size_depends_on_data(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host has to know data of the GPU to allocate a result; so for an index of booleans."""
    if func in _INDEXING:
        return any(on_cuda(i) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return func in _SIZES and on_cuda(args[0])


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait for a number of the GPU, or for the end of a copy."""
    if func in _NUMBERS:
        return on_cuda(args[0])
    if func is _aten._to_copy.default:
        source, device = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        later = kwargs.get("non_blocking", False)
    elif func is _aten.copy_.default:
        source, device = args[1].device, args[0].device
        later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if args[1].ndim == 0 and source.type == "cpu":
            return False  # a number, which a kernel takes as an argument
    else:
        return False
    return source.type != device.type and not (device.type == "cuda" and later)


def package_lines() -> str:
    """The package's lines on the stack, the last three."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(PACKAGE))]
    return " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:]) or ELSEWHERE


def faked(module: AnyModule, device: torch.device = CUDA) -> AnyModule:
    """``module``, made with real parameters, with fake ones on a device instead."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def like(data: TensorDictBase, device: torch.device = CUDA) -> TensorDict:
    """Fake tensors of the shapes of ``data`` on a device."""
    leaves = {key: torch.empty(value.shape, dtype=value.dtype, device=device) for key, value in data.items(True, True)}
    return TensorDict(leaves, data.batch_size)


def devices_of(value: Any) -> set[str]:
    """Device types of all tensors in a module, TensorDict, mapping, sequence or tensor."""
    if isinstance(value, nn.Module):
        return devices_of([*value.parameters(), *value.buffers()])
    if isinstance(value, Tensor):
        return {value.device.type}
    if isinstance(value, TensorDictBase):
        return devices_of(list(value.values(True, True)))
    if isinstance(value, dict):
        return devices_of(list(value.values()))
    return {device for item in value for device in devices_of(item)} if isinstance(value, (list, tuple)) else set()


def set_device(parameter: FakeTensor, other: FakeTensor) -> None:
    """Move a fake parameter, in place, to the device of another."""
    parameter.fake_device = other.fake_device


def machine_with_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The mode, to be entered, on a machine that seems to have a GPU until the patches are undone.

    The state of the GPU's generator is a constant.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    group = torch._C._group_tensors_by_device_and_dtype
    monkeypatch.setattr(
        torch._C,
        "_group_tensors_by_device_and_dtype",
        lambda *args: {(CUDA if d == META else d, dtype): g for (d, dtype), g in group(*args).items()},
    )
    supported = torch.utils._foreach_utils._foreach_supported_types
    monkeypatch.setattr(torch.utils._foreach_utils, "_foreach_supported_types", [*supported, FakeTensor])
    # ``module.to``, which sets the data of a real parameter, exchanges a fake one for another.
    monkeypatch.setattr(torch.utils, "swap_tensors", set_device)
    return FakeCuda()
