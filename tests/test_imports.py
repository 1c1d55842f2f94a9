"""What an import costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pwm_torchrl

ROOT = Path(pwm_torchrl.__file__).parent
#: The folders from the ground up: each imports only itself, the top level and what stands before it.
FOLDERS = (
    "modules", "objectives", "algorithm", "memory", "distributed", "envs", "data", "run", "plugin", "cluster", "report",
    "cli",
)  # fmt: skip
#: Top-level modules that only name what is public of ``plugin`` and ``run``.
PUBLIC = {"configs", "training"}
#: Function-level imports of our own package: of what needs an optional library, and of the names that importing the
#: package itself gives. Commands import nothing in functions: ``cli.entry`` imports their modules by name.
FUNCTION_LEVEL = {
    "": {"training"},
    "envs.makers": {"envs.batch", "envs.dm_control", "envs.gym"},
}
#: What looks at memory while a run trains; of ours it imports the configuration's schema alone.
WATCHER = ("cgroups", "readings", "budget", "watch")
HEAVY = {"torch", "torchrl", "tensordict", "hydra", "omegaconf", "gymnasium", "dm_control", "mujoco", "matplotlib",
         "wandb", "tensorboard", "submitit", "tqdm", "rich", "numpy", "pandas", "scipy"}  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    options = ["-W", "ignore", "-c", code]
    out = subprocess.run([sys.executable, *options], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(out.stdout.split())


def test_the_package_is_light():
    assert not loaded_by("import pwm_torchrl, pwm_torchrl.config, pwm_torchrl.errors") & HEAVY


def test_the_registry_of_tasks_is_light():
    assert not loaded_by("import pwm_torchrl.envs, pwm_torchrl.envs.tasks as t; t.task_set('mt80')") & HEAVY


def test_the_environments_names_are_those_of_their_modules():
    """One that a submodule shares would be the function or the module, depending on what was imported before."""
    from pwm_torchrl import envs

    modules = {path.stem for path in (ROOT / "envs").iterdir()}
    assert not modules & set(envs.__all__)
    assert set(envs._HOME) | {"EnvironmentFault"} == set(envs.__all__) <= set(dir(envs))
    assert all(getattr(envs, name).__name__ == name for name in envs.__all__)


@pytest.mark.parametrize("module", ["cluster.end_of_job", "cluster.submission", "cluster.job"])
def test_around_a_job_there_is_no_torch(module):
    """The end of a job has seconds; what commands import is in tests/cli/test_entry.py."""
    assert not loaded_by(f"import pwm_torchrl.{module}") & {"torch", "torchrl", "tensordict", "numpy", "hydra"}


#: Makes libraries look as if they were not installed; TorchRL itself imports those that are.
ABSENT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize("module", ["pwm_torchrl.objectives", "pwm_torchrl.run.train"])
def test_optional_libraries_are_optional(module):
    """A loss needs torch, tensordict and torchrl; the rest load what is optional where it is used."""
    names = HEAVY - {"torch", "torchrl", "tensordict", "numpy"} | {"yaml", "psutil", "imageio", "imageio_ffmpeg"}
    loaded = loaded_by(ABSENT.format(names=names) + f"import {module}")
    assert "torchrl" in loaded
    assert not loaded & names


class Import(NamedTuple):
    """One import of our own package."""

    source: str  # the module that imports, without ``pwm_torchrl.``
    target: str  # the module that is imported
    in_function: bool


def modules_of_the_package() -> dict[str, Path]:
    """Files by dotted name below ``pwm_torchrl``; a folder has that of its ``__init__``."""
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): file for name, file in named.items()}


MODULES = modules_of_the_package()


def imports_of(source: str) -> Iterator[Import]:
    """Imports of our own package that run; those for type checkers alone do not."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{source}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in names:
                package, _, target = name.partition(".")
                if package == "pwm_torchrl":
                    while target not in MODULES:  # the last part names something in a module
                        target = target.rpartition(".")[0]
                    yield Import(source, target, in_function)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, in_function or inside)

    yield from visit(ast.parse(MODULES[source].read_text(encoding="utf-8")), False)


IMPORTS = [each for source in MODULES for each in imports_of(source) if each.target != source]


def folder_of(module: str) -> str:
    """``"run"`` of ``"run.loop"``; empty for the top level."""
    return module.partition(".")[0] if (ROOT / module.partition(".")[0]).is_dir() else ""


def test_imports_point_one_way():
    place = {"": 0} | {folder: number for number, folder in enumerate(FOLDERS, 1)}
    wrong = {
        f"{each.source} imports {each.target}"
        for each in IMPORTS
        if each.source not in PUBLIC | {""} and place[folder_of(each.target)] > place[folder_of(each.source)]
    }
    assert not wrong


def test_only_users_import_the_public_names():
    """Otherwise the ground floor would lead up again."""
    assert not [
        each for each in IMPORTS if each.target in PUBLIC and folder_of(each.source) not in ("cli", "cluster", "")
    ]


def test_no_circles():
    """Not by imports inside functions either; a folder's ``__init__`` that loads names on first use is none."""
    following: dict[str, set[str]] = {}
    for each in IMPORTS:
        following.setdefault(each.source, set()).add(each.target)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(following.get(module, ())):
                walk(target, (*path, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


def test_imports_inside_functions_are_listed():
    inside: dict[str, set[str]] = {}
    for each in IMPORTS:
        if each.in_function:
            inside.setdefault(each.source, set()).add(each.target)
    assert inside == FUNCTION_LEVEL


@pytest.mark.parametrize("name", WATCHER)
def test_the_watcher_imports_the_schema_alone(name):
    targets = {each.target for each in IMPORTS if each.source == f"memory.{name}"}
    assert targets <= {"config", *(f"memory.{other}" for other in WATCHER)}


def test_every_folder_has_its_place():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", ["modules", "objectives"])
def test_the_core_knows_no_application(folder):
    """No Hydra, logger, cluster or environment library, not even lazily."""
    foreign = {"hydra", "omegaconf", "wandb", "submitit", "gymnasium", "dm_control", "mujoco", "tensorboard"}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & foreign, file
