"""One task's view of a multi-task world model is that model, with the padding out of sight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import TaskWorldModel, WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMModelLoss

DYNAMICS = [{"kind": "mlp"}, {"kind": "flow", "solver": "heun", "substeps": 2}]


def spec(**changes):
    values = {"num_tasks": 2, "task_dim": 4, "action_dims": (1, 2), "reward_head": "two_hot", **changes}
    return WorldModelSpec(8, 2, 16, [32], [32], **values)


@pytest.fixture(params=DYNAMICS, ids=["mlp", "flow"])
def models(request):
    torch.manual_seed(0)
    made = spec(dynamics=request.param)
    model = make_world_model(made)
    torch.nn.init.normal_(model.reward.net[-1].weight)
    return model, TaskWorldModel(model, made, task=0, observation_dim=3, action_dim=1)


def test_encodes_and_predicts_as_the_whole_model(models):
    model, bound = models
    observation, action, task = torch.randn(5, 3), torch.rand(5, 1), torch.zeros(5, dtype=torch.int64)
    latent = bound.encode(observation)
    assert torch.equal(latent, model.encode(F.pad(observation, (0, 5)), task))
    for mine, whole in zip(bound(latent, action), model(latent, F.pad(action, (0, 1)), task), strict=True):
        assert torch.equal(mine, whole)


def test_the_other_task_is_another_model(models):
    model, bound = models
    other = TaskWorldModel(model, spec(), task=1, observation_dim=3, action_dim=2)
    observation = torch.randn(5, 3)
    assert not torch.allclose(bound.encode(observation), other.encode(observation))


def test_is_single_task_to_a_loss_and_shares_its_parameters(models):
    model, bound = models
    loss = PWMModelLoss(bound)
    assert not loss.multi_task
    ours = {id(p) for p in bound.parameters()}
    assert ours == {id(p) for p in model.parameters()}


def test_time_major_latents(models):
    _, bound = models
    latent = bound.encode(torch.randn(4, 5, 3))
    assert bound(latent, torch.rand(4, 5, 1))[0].shape == (4, 5, 16)


def test_takes_over_parameters(models):
    model, bound = models
    expected = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(expected, strict=False)
    bound.load_multi_task(other)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("task", "observation_dim", "action_dim", "match"),
    [(2, 3, 1, "2 tasks"), (0, 9, 1, "at most 8"), (0, 3, 2, "1 action dimensions")],
)
def test_refuses_what_the_model_does_not_have(task, observation_dim, action_dim, match):
    made = spec()
    with pytest.raises(ConfigurationError, match=match):
        TaskWorldModel(make_world_model(made), made, task, observation_dim, action_dim)
