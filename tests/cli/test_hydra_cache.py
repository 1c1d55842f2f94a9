"""What is kept of earlier words changes nothing: a composition is that of all words and of the files as they are."""

from __future__ import annotations

import shutil
from unittest.mock import patch

import pytest

pytest.importorskip("hydra")

from hydra.errors import HydraException
from omegaconf import OmegaConf

from pwm_torchrl.choices import configs_dir, group_choices
from pwm_torchrl.cli import hydra_cache
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.hydra_cache import compose_with_hydra
from pwm_torchrl.errors import ConfigurationError

WORDS = [
    [],
    ["model=mlp"],
    ["seed=3", "model=mlp", "seed=5"],
    ["model.dynamics={kind: mlp}", "model=flow_v2", "model.dynamics.substeps=2"],
    ["size=5m", "size.units=[16,16]", "size.encoder_units=${size.units}"],
    ["env=cartpole_swingup", "++env.terminates=true", "env.num_envs=2"],
    ["env=custom", "++env._target_=a.b", "++env.names={left: 1, right: [2]}"],
    ["cluster=l40s", "++cluster.sbatch.reservation=course", "++cluster.sbatch={nice: 5}"],
    ["algorithm.horizon=4", "experiment=dflex_ant_5m_mlp", "env=pendulum"],
    ["run_dir='a=b, c'", "logger.notes=null", "runs_dir=${oc.env:HOME}"],
    ["env.num_envs=2", "env={num_envs: 3}"],
    ["model.dynamics.kind=mlp", "model={dynamics: {kind: flow}}", "model=residual"],
    ["~env.num_envs"],
    ["+env.mass=2"],
]


def composed(words, folder=None):
    return compose_with_hydra(folder or configs_dir(), words, group_choices().keys())


@pytest.fixture
def folder(tmp_path):
    """A copy of the configuration files, to be changed."""
    return shutil.copytree(configs_dir(), tmp_path / "configs")


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_is_what_hydra_composes_of_all_words(words):
    found, expected = composed(words), hydra_cache._of_words(configs_dir(), words)
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
    assert OmegaConf.to_object(found) == OmegaConf.to_object(expected)
    assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)


def test_files_are_read_once_for_the_same_choices():
    composed(["model=mlp"])
    with patch.object(hydra_cache, "hydra_compose", side_effect=AssertionError):
        assert composed(["seed=3", "model=mlp"]).seed == 3
        with pytest.raises(AssertionError):
            composed(["seed=3", "model=mlp", "size=19m"])


def test_what_a_caller_changes_is_its_own():
    first = composed(["model=mlp"])
    first.size.units.append(7)
    first.model.dynamics.kind = "flow"
    assert composed(["model=mlp"]) == hydra_cache._of_words(configs_dir(), ["model=mlp"])


def test_a_changed_file_is_seen(folder):
    file = folder / "model" / "mlp.yaml"
    for name in ("one", "two"):  # as long, and written in the same moment
        file.write_text(f"# A model.\nname: {name}\ndynamics:\n  kind: mlp\n")
        assert composed(["model=mlp"], folder).model.name == name
    (folder / "model" / "more.yaml").write_text("name: more\n")
    assert composed(["model=more"], folder).model.name == "more"
    file.write_text("name: mlp\nknid: mlp\n")
    with pytest.raises(HydraException):
        composed(["model=mlp"], folder)


def test_a_changed_profile_of_the_user_is_seen(tmp_path, monkeypatch):
    (tmp_path / "cluster").mkdir()
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    for partition in ("cpu", "gpu"):
        (tmp_path / "cluster" / "mine.yaml").write_text(f"kind: slurm\npartition: {partition}\n")
        assert compose(["cluster=mine"]).cluster.partition == partition
    (tmp_path / "cluster" / "mine.yaml").unlink()
    with pytest.raises(ConfigurationError, match="mine"):
        compose(["cluster=mine"])


@pytest.mark.parametrize(
    "words",
    [["seed=abc"], ["seeed=1"], ["+seed=1"], ["a=[b"], ["model=none"], ["++hydra/job_logging=disabled"]],
    ids=" ".join,
)
def test_mistakes_are_told_by_hydra(words):
    with pytest.raises(HydraException) as expected:
        hydra_cache._of_words(configs_dir(), words)
    with pytest.raises(HydraException) as found:
        composed(words)
    assert str(found.value) == str(expected.value)
