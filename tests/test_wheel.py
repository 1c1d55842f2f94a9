"""The wheel by itself: built, installed beside the libraries that are here, and used outside of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install 'pwm-torchrl[dev]' brings hatchling, which builds the wheel")

ROOT = Path(__file__).parents[1]
COMMANDS = ("pwm-train", "pwm-submit", "pwm-plan", "pwm-report")
#: An epoch that does as little as it can.
SHORT = (
    "training.epochs=1",
    "training.eval_episodes=1",
    "training.video=false",
    "training.gradient_profile_every=0",
    "training.progress=false",
    "algorithm.first_model_updates=1",
    "algorithm.model_updates=1",
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command of a fresh environment in an empty directory, and returns what it prints."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=True)
    bin_dir = folder / "venv" / "bin"
    purelib = subprocess.run(
        [bin_dir / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # Only a path: the `.pth` files over there, such as that of a checkout, are not read.
    Path(purelib, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [bin_dir / "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", wheel]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(install, check=True, env=environment)
    empty = folder / "empty"
    empty.mkdir()

    def run(program, *words):
        command = [str(bin_dir / program), *map(str, words)]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"
        return done.stdout

    run.folder = empty
    return run


def test_the_wheel_holds_what_is_needed_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    yaml = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("pwm_torchrl/_configs/") for name in names if "/_configs/" in name} == yaml
    assert "hydra_plugins/pwm_torchrl_plugin.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pwm_torchrl", "hydra_plugins"}


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
    text = installed(command, "--help")
    assert f"usage: {command}" in text
    assert "launch/" not in text


def test_from_a_plan_to_a_report(installed):
    assert "memory.actor_micro_batch" in installed("pwm-plan", *SHORT)
    out = installed("pwm-train", *SHORT, "run_dir=first")
    assert "finished" in out.splitlines()[-1]
    readme = (installed.folder / "first" / "README.md").read_text(encoding="utf-8")
    assert "pwm-evaluate RUN " in readme
    assert "launch/" not in readme
    assert "first" in installed("pwm-report", "first", "--out", "report")
    assert (installed.folder / "report" / "report.html").is_file()
    assert sorted(path.name for path in installed.folder.iterdir()) == ["first", "report"]
