"""What an import costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pwm_torchrl

ROOT = Path(pwm_torchrl.__file__).parent
#: What each folder may import beside itself and the top level's ``errors``.
MAY_IMPORT = {
    "modules": set(),
    "objectives": {"modules"},
    "envs": {"modules", "objectives"},
    "data": {"modules", "objectives"},
    "algorithm": {"modules", "objectives"},
    "memory": {"modules", "objectives", "data"},
    "training": {"modules", "objectives", "envs", "data", "algorithm", "memory"},
    "run": {"modules", "objectives", "envs", "data", "algorithm", "memory", "training"},
    "cluster": {"modules", "objectives", "envs", "data", "algorithm", "memory", "training", "run"},
    "launch": {"modules", "objectives", "envs", "data", "algorithm", "memory", "training", "run", "cluster"},
    "configs": {"modules", "objectives", "envs", "training"},
}
#: Modules that a folder may import beside whole folders: memory predicts from the one construction site and what an
#: update keeps to be taken back with. They know nothing of memory, so that there is no circle. Offline data are
#: numbered and checked by the task registry, which is light. What is loaded from a run is evaluated as in a run.
SINGLE = {
    "memory": {"algorithm.build", "algorithm.updates"},
    "data": {"envs.tasks"},
    "training": {"run.evaluation"},
}
#: What looks at memory while a run trains; it imports nothing of ours.
WATCHER = ("cgroups", "readings", "budget", "watch")
HEAVY = {"torch", "torchrl", "tensordict", "hydra", "omegaconf", "gymnasium", "dm_control", "mujoco", "matplotlib",
         "wandb", "tensorboard", "submitit", "tqdm", "rich", "numpy"}  # fmt: skip


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


def test_the_command_line_starts_without_torch():
    loaded = loaded_by("import pwm_torchrl.launch.compose, pwm_torchrl.launch.report")
    assert not loaded & {"torch", "torchrl", "gymnasium", "dm_control", "mujoco", "matplotlib", "wandb"}


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


def imports_of(file: Path) -> Iterator[str]:
    """Modules and names of the package's folders that a file imports, anywhere in it: ``"training.build"``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # ``from pwm_torchrl import training`` names the folder on the right.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pwm_torchrl" and len(parts) > 1 and (ROOT / parts[1]).is_dir():
                yield ".".join(parts[1:3])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    allowed, single = MAY_IMPORT[folder] | {folder}, SINGLE.get(folder, set())
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imports_of(file)
        if name.split(".")[0] not in allowed and name not in single
    }
    assert not wrong


def test_what_memory_predicts_from_knows_no_memory():
    waiting, seen = [name.replace(".", "/") for name in SINGLE["memory"]], set()
    while waiting:
        path = waiting.pop()
        if path not in seen and (ROOT / f"{path}.py").is_file():
            seen.add(path)
            names = list(imports_of(ROOT / f"{path}.py"))
            assert not [name for name in names if name.split(".")[0] == "memory"], path
            waiting += [name.replace(".", "/") for name in names]
    assert {name.replace("/", ".") for name in seen} >= SINGLE["memory"]


@pytest.mark.parametrize("name", WATCHER)
def test_the_watcher_imports_nothing_of_ours(name):
    imports = set(imports_of(ROOT / "memory" / f"{name}.py"))
    assert imports <= {f"memory.{other}" for other in WATCHER}


def test_every_folder_has_its_place():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(MAY_IMPORT)


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
