"""Memory of known GPU types, for plans made where the GPU is not."""

from __future__ import annotations

import difflib
import re

from pwm_torchrl.memory.units import GIB, MIB

__all__ = ["gpu_bytes", "gpu_names", "usable_gpu_bytes"]

# Type -> {nominal GB: total in MiB as nvidia-smi reports it}; with several sizes, the smallest comes first. Where
# the total depends on whether ECC is on, it is the smaller one.
_GPUS: dict[str, dict[int, int]] = {
    "a10": {24: 23028},
    "a10g": {24: 23028},
    "a40": {48: 46068},
    "a100": {40: 40960, 80: 81920},
    "a6000": {48: 49140},
    "b200": {180: 183359},
    "gh200": {96: 97871},
    "h100": {80: 81559, 94: 95830},
    "h200": {141: 143771},
    "l4": {24: 23034},
    "l40": {48: 46068},
    "l40s": {48: 46068},
    "t4": {16: 15360},
    "v100": {16: 16384, 32: 32768},
    "2080ti": {11: 11264},
    "3090": {24: 24576},
    "4090": {24: 24564},
    "5090": {32: 32607},
    "6000ada": {48: 46068},
    "8000": {48: 46080},
}

# Words that say nothing of the memory: "Tesla V100-SXM2-32GB", "nvidia_h100_80gb_hbm3", "quadro_rtx_8000".
_NOISE = {"nvidia", "tesla", "geforce", "quadro", "rtx", "gpu", "generation", "pcie", "pcie4", "hbm2", "hbm2e", "hbm3",
          "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "nvl"}  # fmt: skip


def gpu_names() -> list[str]:
    """Names that :func:`gpu_bytes` knows; types with several sizes with each of them (``a100-40gb``)."""
    return [f"{name}-{size}gb" if len(sizes) > 1 else name for name, sizes in sorted(_GPUS.items()) for size in sizes]


def gpu_bytes(name: str) -> int:
    """Total memory of a type of GPU, as ``nvidia-smi`` reports it.

    Args:
        name (str): ``l40s``, ``a100-80gb``, ``rtx4090``, ``NVIDIA H100 80GB HBM3``, ``v100-sxm2-32gb``, ... A type with
            several sizes, named without one, is taken for its smallest.

    Returns:
        int: bytes; less is free for a program, see :func:`usable_gpu_bytes`.

    Raises:
        ValueError: for a name that is not known, with the nearest one that is.
    """
    words = [word for word in re.split(r"[\s_\-]+", name.lower()) if word and word not in _NOISE]
    sizes = [int(match[1]) for word in words if (match := re.fullmatch(r"(\d+)g(?:i?b)?", word))]
    kind = "".join(word for word in words if not re.fullmatch(r"\d+g(?:i?b)?", word)).removeprefix("rtx")
    known = _GPUS.get(kind)
    if known is None or len(sizes) > 1 or (sizes and sizes[0] not in known):
        named = "-".join([kind, *(f"{size}gb" for size in sizes)])
        near = difflib.get_close_matches(named, gpu_names(), n=3, cutoff=0.5)
        hint = f"the nearest known: {', '.join(near)}" if near else f"known: {', '.join(gpu_names())}"
        raise ValueError(f"unknown GPU type {name!r}; {hint}")
    return known[sizes[0] if sizes else min(known)] * MIB


def usable_gpu_bytes(name: str) -> int:
    """What PyTorch can have of a type of GPU: its total less what the driver reserves and a CUDA context takes.

    The two together are taken as 3 % of the total, at least 1 GiB; on the types for which PyTorch's own count of the
    total is known (0.97 to 0.995 of nvidia-smi's), that leaves room for the context.

    Args:
        name (str): as in :func:`gpu_bytes`.

    Returns:
        int: bytes.

    Raises:
        ValueError: for a name that is not known.
    """
    total = gpu_bytes(name)
    return total - max(GIB, total * 3 // 100)
