"""A script that knows TorchRL and Hydra alone trains PWM, and by another word SAC."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchrl.trainers.algorithms import configs as torchrl_configs

from pwm_torchrl.modules import ResidualEndpointFlow
from pwm_torchrl.objectives import PWMActorLoss

SCRIPT = Path(__file__).parent / "script" / "train.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [([], "PWMActorLoss: 256 frames, 4 updates"), (["loss=sac"], "SACLoss: 256 frames, 8 updates")],
    ids=["pwm_actor", "sac"],
)
def test_one_word_changes_the_algorithm(words, said, tmp_path):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *words, f"hydra.run.dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == said


def composed(*words):
    assert torchrl_configs  # fills the ConfigStore, as a script's import does
    with initialize_config_dir(str(SCRIPT.parent / "conf"), version_base="1.3"):
        return compose("config", list(words))


def test_parts_of_a_configuration_are_one_set_of_networks():
    trainer = instantiate(composed().trainer)
    algorithm = trainer.optimization_stepper.algorithm
    networks = algorithm.networks
    assert isinstance(trainer.loss_module, PWMActorLoss)
    assert trainer.loss_module.horizon == 4
    assert isinstance(networks.model.dynamics, ResidualEndpointFlow)
    assert networks.model.dynamics.substeps == 2

    def pointers(module):
        return {p.data_ptr() for p in module.parameters()}

    acting = pointers(trainer.collector.policy)
    assert pointers(trainer.loss_module) == pointers(networks.actor)
    assert pointers(networks.actor) | pointers(networks.model) == acting
    assert pointers(algorithm.losses.model) == pointers(networks.model)
    assert pointers(algorithm.losses.critic) == pointers(networks.critic)
    assert pointers(trainer.loss_module.world_model) == pointers(networks.model)
    trainer.collector.shutdown()


@pytest.mark.parametrize("name", ["pwm_mlp", "pwm_residual", "pwm_tangent_flow"])
def test_dynamics_are_a_choice_of_the_command_line(name):
    model = instantiate(composed(f"network@trainer.world_model.dynamics={name}").trainer.world_model)
    assert type(model.dynamics).__name__ == {
        "pwm_mlp": "MLPDynamics", "pwm_residual": "ResidualDynamics", "pwm_tangent_flow": "TangentFlow"
    }[name]  # fmt: skip


def test_the_same_script_composes_sac():
    cfg = composed("loss=sac")
    assert cfg.loss._target_.startswith("torchrl.")
    assert cfg.trainer._target_ == "torchrl.trainers.algorithms.configs.trainers._make_sac_trainer"
