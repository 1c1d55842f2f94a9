"""Dynamics of a user's own, by their dotted path."""

from __future__ import annotations

import sys

import pytest
import torch
from training_cases import config

from pwm_torchrl.cli.finalize import compose_and_finalize as compose
from pwm_torchrl.cluster.snapshot import targets_of
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModelSpec, make_dynamics, make_world_model, read_world_model, save_world_model
from pwm_torchrl.training import load_world_model, train

MODULE = '''
import torch
from pwm_torchrl.modules import Dynamics, SimNorm

class Linear(Dynamics):
    """One layer."""

    def __init__(self, latent_dim, action_dim, task_dim, units, simnorm_dim):
        super().__init__()
        self.layer = torch.nn.Linear(latent_dim + action_dim + task_dim, latent_dim)
        self.norm = SimNorm(simnorm_dim)

    def forward(self, latent, action, task_embedding=None):
        parts = [latent, action] if task_embedding is None else [latent, action, task_embedding]
        return self.norm(self.layer(torch.cat(parts, -1)))

class Other(torch.nn.Module):
    pass
'''
KIND = "my_dynamics.Linear"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_dynamics.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_dynamics", None)


def test_are_made_and_saved_with_the_world_model(folder):
    dynamics = make_dynamics(KIND, 16, 2, 4, [8])
    assert dynamics(torch.rand(3, 16), torch.rand(3, 2), torch.rand(3, 4)).shape == (3, 16)
    spec = WorldModelSpec(3, 2, 16, [8], [8], dynamics={"kind": KIND})
    model = make_world_model(spec)
    save_world_model(folder / "saved", model, spec, task_names=(), observation_dims=(3,))
    again, _ = read_world_model(folder / "saved")
    assert torch.equal(again.dynamics.layer.weight, model.dynamics.layer.weight)


def test_train_from_the_command_line(folder):
    composed = compose([f"model.dynamics.kind={KIND}"])
    assert composed.model.name == "Linear"
    cfg = config({"model.dynamics.kind": KIND, "training.epochs": 1, "training.eval_every": 0})
    assert train(cfg, folder / "run")["status"] == "finished"
    module = load_world_model(folder / "run", "latest")
    assert any("layer.weight" in name for name, _ in module.named_parameters())


def test_their_code_goes_with_a_job():
    assert list(targets_of({"model": {"dynamics": {"kind": KIND}}, "logger": {"kind": "csv"}})) == [KIND]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no_such_module.Linear", "there is no module 'no_such_module'"),
        ("my_dynamics.Linaer", "my_dynamics has no 'Linaer', did you mean Linear"),
        ("my_dynamics.Other", "is not a subclass of pwm_torchrl.modules.Dynamics"),
        ("lstm", "model.dynamics.kind=lstm .*flow, mlp, residual"),
    ],
)
def test_refused(kind, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        compose([f"model.dynamics.kind={kind}"])
