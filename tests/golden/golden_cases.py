"""Golden cases: what lies in a folder, and how close is close enough."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

RTOL, ATOL = 1e-4, 1e-6  # the absolute one times max|expected|
NOT_EXPECTED = ("in.", "world_model.", "actor.", "critic_ensemble.", "tdlambda.")


@dataclass
class Case:
    """Arrays and configuration of one case; ``problem`` says why it cannot be used."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    checkpoint: Path | None = None
    problem: str | None = None
    _actual: dict[str, Tensor] | None = None

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose key starts with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    @property
    def kind(self) -> str | None:
        """``tdmpc2``, ``flow``, ``world_model`` or ``None``, told by checkpoint, metadata and keys."""
        if self.checkpoint is not None:
            return "tdmpc2" if {"obs", "action"} <= self.arrays.keys() else None
        names = self.of("world_model.").keys()
        if not {"in.observation", "in.action"} <= self.arrays.keys() or not self.config:
            return None
        if any(n.startswith("_velocity.") for n in names):
            return "flow"
        if any(n.startswith("_dynamics.") for n in names):
            return "world_model"
        return None

    @property
    def expected(self) -> list[str]:
        """Keys of everything that has to be reproduced."""
        if self.checkpoint is not None:
            return [k for k in self.arrays if k not in ("obs", "action", "task")]
        return [k for k in self.arrays if k == "tdlambda.target" or not k.startswith(NOT_EXPECTED)]

    def actual(self, compute: Callable[[Case], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Our values of the expected keys, computed once."""
        if self._actual is None:
            self._actual = compute(self)
        return self._actual


def find_cases(folder: Path) -> list[Case]:
    """Every case of a folder: a .safetensors file, or a .pt with its .safetensors; unusable ones say why."""
    if not folder.is_dir():
        return [Case(str(folder), problem=f"{folder} is not a folder.")]
    stems = sorted({p.stem for p in folder.iterdir() if p.suffix in (".safetensors", ".pt")})
    return [_read(folder, stem) for stem in stems] or [Case(str(folder), problem=f"{folder} holds no golden case.")]


def _read(folder: Path, stem: str) -> Case:
    path, checkpoint = folder / f"{stem}.safetensors", folder / f"{stem}.pt"
    case = Case(stem, checkpoint=checkpoint if checkpoint.exists() else None)
    try:
        with safe_open(path, "pt") as file:
            case.config = json.loads((file.metadata() or {}).get("config", "{}"))
            case.arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        case.problem = f"{path.name}: {error}"
        return case
    activation = str(case.config.get("activation", "Mish"))
    if activation.lower() not in ("mish", "nn.mish", "torch.nn.mish"):
        case.problem = f"{path.name} was made with activation {activation}; only Mish is implemented."
    elif case.kind == "flow" and not re.match(r"z, ?action, ?tau\b", case.config.get("input_order", "z, action, tau")):
        case.problem = f"{path.name}: velocity inputs in the order {case.config['input_order']} are not implemented."
    elif case.kind is None:
        case.problem = f"{path.name} matches no kind of golden case (keys {', '.join(sorted(case.arrays)[:8])} ...)."
    elif not case.expected:
        case.problem = f"{path.name} holds no expected value."
    return case


def assert_agrees(key: str, actual: Tensor, expected: Tensor) -> None:
    """Equal up to RTOL and ATOL · max|expected|, in float32; only dimensions of size 1 may differ in shape."""
    squeezed, wanted = ([n for n in t.shape if n != 1] for t in (actual, expected))
    assert squeezed == wanted, f"{key}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == torch.float32, f"{key} is {actual.dtype}"
    assert expected.isfinite().all(), f"{key}: the expected values are not finite"
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape),
        expected.float(),
        rtol=RTOL,
        atol=ATOL * expected.abs().max().item(),
        msg=lambda text: f"{key}: {text}",
    )
