"""What an algorithm's class declares about its settings: keys that it ignores, smallest values. Does not import torch.

The declarations are attributes of the class (:class:`~pwm_torchrl.algorithm.base.Algorithm` documents them), and are
written nowhere else. A setting that the chosen algorithm ignores is refused before torch is imported, which takes
seconds. Therefore :func:`declarations` reads a packaged class from its source; it imports a user's class.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pwm_torchrl
from pwm_torchrl.config import ALGORITHMS, AlgorithmConfig
from pwm_torchrl.errors import ConfigurationError, nearest
from pwm_torchrl.user_code import locate

__all__ = ["Declarations", "check_least", "declarations"]


@dataclass(frozen=True)
class Declarations:
    """Values of the class attributes of the same names of :class:`~pwm_torchrl.algorithm.base.Algorithm`."""

    simulates: bool = False
    ignored: tuple[str, ...] = ()
    ignored_online: tuple[str, ...] = ()
    least: Mapping[str, float] = field(default_factory=dict)

    def ignores(self, key: str, mode: str) -> bool:
        """Whether a key of ``algorithm.``, written without that, has no effect on a run of this mode."""
        return key in self.ignored or (mode == "online" and key in self.ignored_online)


_NAMES = tuple(each.name for each in fields(Declarations))


def declarations(name: str) -> Declarations:
    """What the class of an algorithm declares.

    Args:
        name (str): ``algorithm.name``: one of :data:`~pwm_torchrl.config.ALGORITHMS`, or the dotted path of a class.

    Raises:
        ConfigurationError: if a user's class does not exist, or declares something about a key that does not exist.
    """
    path = ALGORITHMS.get(name, name)
    if path in ALGORITHMS.values():
        return Declarations(**_read(path))
    found = locate("algorithm.name", path)
    declared = Declarations(**{each: getattr(found, each) for each in _NAMES if hasattr(found, each)})
    _check_keys(path, declared)
    return declared


@cache
def _read(path: str) -> dict[str, Any]:
    """The declarations in the source of a packaged class and of its base classes."""
    module, _, name = path.rpartition(".")
    file = Path(pwm_torchrl.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    imported = {
        alias.name: str(each.module) for each in body if isinstance(each, ast.ImportFrom) for alias in each.names
    }
    (found,) = (each for each in body if isinstance(each, ast.ClassDef) and each.name == name)
    declared: dict[str, Any] = {}
    for base in reversed(found.bases):
        written = ast.unparse(base)
        declared |= _read(f"{imported.get(written, module)}.{written}")
    for each in found.body:
        targets = [each.target] if isinstance(each, ast.AnnAssign) else getattr(each, "targets", [])
        for target in targets:
            if isinstance(target, ast.Name) and target.id in _NAMES:
                declared[target.id] = ast.literal_eval(each.value)  # type: ignore[attr-defined]
    return declared


def _check_keys(path: str, declared: Declarations) -> None:
    known = {each.name for each in fields(AlgorithmConfig)}
    for attribute, kind, called in (("ignored", tuple, "a tuple"), ("ignored_online", tuple, "a tuple"),
                                    ("least", Mapping, "a dict")):  # fmt: skip
        keys = getattr(declared, attribute)
        if not isinstance(keys, kind):
            raise ConfigurationError(
                f"algorithm.name={path}: its attribute {attribute}={keys!r} is not {called} of keys of algorithm"
            )
        for key in keys:
            if key not in known:
                near = nearest(str(key), known)
                raise ConfigurationError(
                    f"algorithm.name={path}: its attribute {attribute} names {key!r}, which is not a key of algorithm"
                    + (f"; nearest: {near}" if near else "; write the keys without `algorithm.`")
                )


def check_least(algorithm: AlgorithmConfig, least: Mapping[str, float]) -> None:
    """Check values against the smallest ones that an algorithm accepts.

    Args:
        algorithm (AlgorithmConfig): the values.
        least (Mapping): smallest values by key, as the algorithm's class declares them.

    Raises:
        ConfigurationError: for the first value that is too small.
    """
    for key, smallest in least.items():
        value = getattr(algorithm, key)
        if value is not None and value < smallest:
            raise ConfigurationError(
                f"algorithm.{key}={value} is too small; it must be at least {smallest:g} with "
                f"algorithm.name={algorithm.name}"
            )
