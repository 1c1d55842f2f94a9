"""The wheel by itself: built, installed beside the libraries that are here, and used outside of the source tree."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install 'pwm-torchrl[dev]' brings hatchling, which builds the wheel")

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "submit", "plan", "report")
#: An epoch that does as little as it can.
SHORT = (
    "training.epochs=1",
    "training.eval_episodes=1",
    "training.video=false",
    "training.gradient_profile_every=0",
    "training.progress=false",
    "algorithm.first_model_updates=1",
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (file,) = folder.glob("*.whl")
    return file


class Environment:
    """A virtual environment that has the libraries which are here, and nothing of this project.

    Called with a program of it and words, it runs them in an empty directory and returns what was printed.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        self.folder = folder / "empty"
        self.folder.mkdir()
        # Python 3.11's setuptools is older than torch requires.
        self("python", "-m", "pip", "uninstall", "-q", "-y", "setuptools")
        self.site_packages = Path(
            self("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        libraries = folder / "libraries"
        libraries.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if path.suffix != ".pth" and not path.name.startswith(
                ("pwm_torchrl", "__editable__", "hydra_plugins", "pip")
            ):
                (libraries / path.name).symlink_to(path)
        # Only a path: `.pth` files over there are not read.
        (self.site_packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")

    def __call__(self, program, *words, cwd=None):
        command = [str(self.bin / program), *map(str, words)]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, what, *, cwd=None):
        """Installs without an index: what is required has to be there, in a version that is admitted."""
        return self("python", "-m", "pip", "install", "--no-index", "--no-build-isolation", what, cwd=cwd)

    def added(self):
        """What installing brought, beside what the environment began with."""
        own = {path.name.partition("-")[0] for path in self.site_packages.iterdir() if path.suffix != ".pth"}
        return own - {"pip", "_distutils_hack", "pkg_resources", "__pycache__"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(f"{wheel}[gym,launch,plot]")
    return environment


def test_the_wheel_holds_what_is_needed_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    yaml = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("pwm_torchrl/_configs/") for name in names if "/_configs/" in name} == yaml
    assert "hydra_plugins/pwm_torchrl_plugin.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pwm_torchrl", "hydra_plugins"}


TORCH = "import torch; print(torch.__version__, torch.__file__)"


def test_a_torch_that_is_there_is_kept(installed):
    assert installed.added() == {"pwm_torchrl", "hydra_plugins"}
    version, file = installed("python", "-W", "ignore", "-c", TORCH).split()
    assert version == importlib.import_module("torch").__version__
    assert not Path(file).is_relative_to(installed.site_packages)


def test_from_a_clone(tmp_path):
    environment = Environment(tmp_path)
    environment.install(".[gym,launch,plot]", cwd=ROOT)
    assert environment.added() == {"pwm_torchrl", "hydra_plugins"}
    out = environment("python", "-c", "import pwm_torchrl; print(pwm_torchrl.__file__)")
    assert Path(out.strip()).is_relative_to(environment.site_packages)
    assert (environment.bin / "pwm").is_file()


#: The pip of Python 3.11.7, to which dm_control and dm-control are two extras, and the newest.
PIPS = ("pip==23.2.1", "pip")


@pytest.fixture(scope="module", params=PIPS)
def pip(request, tmp_path_factory):
    """A function that runs this pip without the machine's settings; returns stdout and stderr."""
    folder = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip", "install", "-q", "--retries", "1", "--no-deps"]
    command += ["--target", str(folder), request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{request.param} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment.update(PYTHONPATH=str(folder), PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1")

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "pip", *map(str, words)],
            env=environment, cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr

    assert run("--version")[0].startswith(f"pip {request.param.partition('==')[2]}")
    return run


@pytest.fixture(scope="module")
def requirements(wheel):
    """What the wheel says that it needs on this Python, with any of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    extras = metadata.get_all("Provides-Extra")
    assert not [extra for extra in extras if "_" in extra]
    each = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    return [r for r in each if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


@pytest.fixture(scope="module")
def index(requirements, tmp_path_factory):
    """A folder with an empty wheel of each library, in the lowest version admitted; of torch also 2.14.1 and 2.15.0."""
    folder = tmp_path_factory.mktemp("index")
    releases = {("torch", "2.14.1"), ("torch", "2.15.0")}
    for each in requirements:
        versions = [part.version for part in each.specifier if part.operator in ("==", ">=")]
        releases.add((each.name, max(versions, default="1.0")))
    for name, version in releases:
        stem = f"{name.replace('-', '_')}-{version}"
        extras = {extra for each in requirements if each.name == name for extra in each.extras}
        text = "".join(f"Provides-Extra: {extra}\n" for extra in extras)
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            archive.writestr(
                f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{text}"
            )
            archive.writestr(
                f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


@pytest.mark.parametrize("extras", ["dm-control", "dev,minari,brax"])
def test_extras_bring_their_libraries_with_old_and_new_pip(pip, wheel, index, requirements, extras):
    out, err = pip(
        "install", "--dry-run", "-q", "--ignore-installed", "--no-index", "--find-links", index, "--report", "-",
        f"{wheel}[{extras}]",
    )  # fmt: skip
    assert "does not provide" not in err
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(out)["install"]}
    assert found["torch"] == "2.14.1"
    if extras == "dm-control":
        simulators = {"dm-control"} if sys.version_info < (3, 13) else set()
        assert set(found) == {"pwm-torchrl", "torch", "tensordict", "torchrl", "gymnasium", "mujoco"} | simulators
    else:  # these three bring all the others
        names = {"pwm-torchrl", *(canonicalize_name(each.name) for each in requirements)}
        assert {canonicalize_name(name) for name in found} == names


PLUGIN = """
import os
import torchrl.trainers.algorithms.configs
from hydra import compose, initialize
from hydra.utils import instantiate
with initialize(config_path=None, version_base="1.3"):
    cfg = compose(overrides=["+loss=pwm_model", "+network@loss.world_model=pwm_world_model",
        "+network@loss.world_model.dynamics=pwm_flow_v2", "+env=pwm_gymnasium", "+trainer=pwm", "+sampler=pwm_slices",
        "loss.world_model.observation_dim=3", "loss.world_model.action_dim=1", "loss.world_model.latent_dim=16",
        "loss.world_model.units=[8]", "loss.world_model.encoder_units=[8]"])
import pwm_torchrl
print(os.path.dirname(pwm_torchrl.__file__))
print(instantiate(cfg.loss).world_model.dynamics.substeps)
"""


def test_a_torchrl_program_finds_the_entries(installed):
    where, substeps = installed("python", "-W", "ignore", "-c", PLUGIN).split()
    assert Path(where).parents[0].name == "site-packages"
    assert str(ROOT) not in where
    assert substeps == "4"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_by_their_names(installed, command):
    text = installed("pwm", command, "--help")
    assert f"usage: pwm {command}" in text
    assert "launch/" not in text


def test_from_a_plan_to_a_report(installed):
    assert "memory.actor_micro_batch" in installed("pwm", "plan", *SHORT)
    out = installed("pwm", "train", *SHORT, "run_dir=first")
    assert "finished" in out.splitlines()[-1]
    readme = (installed.folder / "first" / "README.md").read_text(encoding="utf-8")
    assert "pwm evaluate RUN " in readme
    assert "launch/" not in readme
    assert "first" in installed("pwm", "report", "first", "--out", "report")
    assert (installed.folder / "report" / "report.html").is_file()
    assert sorted(path.name for path in installed.folder.iterdir()) == ["first", "report"]
