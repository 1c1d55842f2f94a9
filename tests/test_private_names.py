"""Private names of other libraries: those that the package uses are listed in docs/versions.md, and no others are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "pwm_torchrl").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
LIBRARIES = ("torch", "torchrl", "tensordict", "hydra", "omegaconf", "submitit")
#: Documented interfaces whose names begin with an underscore: namedtuples, ``os._exit`` and methods that TorchRL's and
#: torch's documentation tells subclasses to override.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit", "_step", "_reset"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def documented() -> set[str]:
    """Names in backticks in the section of docs/versions.md."""
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    section = text.partition("## Private names")[2].partition("\n## ")[0]
    return {name for name in re.findall(r"`([^`]+)`", section) if any(map(is_private, name.split(".")))}


def own_names(trees: list[ast.AST]) -> set[str]:
    """Names that the package itself defines: functions, classes, variables and attributes of ``self``."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    return own


def foreign_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Private attributes that the package does not define, and imports from private modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | PUBLIC:
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if is_private(part)}
    return found


def test_every_private_name_in_use_is_listed():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    own = own_names(trees)
    used = set().union(*(foreign_names(tree, own) for tree in trees))
    listed = {part for name in documented() for part in name.split(".")}
    assert used - listed == set()
    assert len(used) > 20, "the search finds the names that are known to be used"


def test_every_listed_name_is_in_use():
    code = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    unused = {name for name in documented() if not re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", code)}
    assert unused == set()
