"""Shape checks: a loss refuses what broadcasting would silently accept."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the expected shape; ``None`` matches any size.

    Args:
        name (str): what the tensor is, for the message.
        tensor (Tensor): what to check.
        expected (tuple): size per dimension.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(
            f"{name} has shape {list(shape)} but [{wanted}] is needed; values and rewards end in a dimension of size "
            "1, and nothing is broadcast."
        )


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors have the same shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} but {other_name} has shape {list(other.shape)}; "
            "they must be equal, nothing is broadcast."
        )
