"""Private names of other libraries: those that the package uses are listed in docs/versions.md, and no others are."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "pwm_torchrl").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
LIBRARIES = ("torch", "torchrl", "tensordict", "hydra", "omegaconf", "submitit")
#: Documented interfaces whose names begin with an underscore: namedtuples, ``os._exit`` and methods that TorchRL's and
#: torch's documentation tells subclasses to override.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit", "_step", "_reset", "_set_seed", "_call"}
#: Overrides that the search must find.
KNOWN_OVERRIDES = {
    "OwnUnits._inv_apply_transform",
    "SliceStartSampler._empty",
    "PWMLoss._forward_value_estimator_keys",
    "RunExecutor._submitit_command_str",
}


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


def private_names_of(cls: ast.ClassDef) -> set[str]:
    """Private names that a class defines: methods, nested classes, class variables and attributes of ``self``."""
    in_body = [node for node in cls.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    found = {node.name for node in cls.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in (inner for statement in in_body for inner in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return set(filter(is_private, found))


def is_overridden(name: str, base: str, module: ModuleType) -> bool:
    """Whether a base class, or one of its own bases in another library, has the name."""
    try:
        classes = getattr(eval(base, vars(module)), "__mro__", ())  # NamedTuple is a function
    except NameError:  # a base that is only known at run time may have any name
        return True
    return any(name in vars(each) for each in classes if each.__module__.partition(".")[0] != "pwm_torchrl")


def overrides(path: Path, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Classes of a file and private names in them that a class of another library defines too."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and private_names_of(node)]
    if not classes:
        return
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for cls in classes:
        bases = [ast.unparse(base.value if isinstance(base, ast.Subscript) else base) for base in cls.bases]
        for name in private_names_of(cls) - PUBLIC:
            if any(is_overridden(name, base, module) for base in bases):
                yield cls.name, name


def test_every_overridden_private_name_is_listed():
    """A base class that no longer calls the method would not fail: what the override does would just not happen."""
    found = {
        f"{cls}.{name}" for path in FILES for cls, name in overrides(path, ast.parse(path.read_text(encoding="utf-8")))
    }
    listed = {part for name in documented() for part in name.split(".")}
    assert {name for name in found if name.partition(".")[2] not in listed} == set()
    assert found >= KNOWN_OVERRIDES, "the search finds the overrides that are known"


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
