"""World model and task embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    TaskEmbedding,
    TaskWorldModel,
    WorldModel,
    WorldModelSpec,
    make_world_model,
)
from pwm_torchrl.objectives import PWMModelLoss

OBS, A, D, N, DIMS = 5, 3, 16, 4, (3, 1, 2, 3)


def world_model(tasks: bool = False, **kwargs: object) -> WorldModel:
    multi = {"num_tasks": N, "task_dim": 6, "action_dims": DIMS} if tasks else {}
    model = make_world_model(WorldModelSpec(OBS, A, D, [24], [20], **multi, **kwargs))
    for p in model.reward.parameters():  # its last layer starts at zero, which would hide mistakes
        nn.init.normal_(p, std=0.3)
    return model


class TestTaskEmbedding:
    @pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
    def test_agrees_with_embedding_max_norm_without_touching_its_weight(self, scale: float) -> None:
        reference, ours = nn.Embedding(N, 6, max_norm=1.0), TaskEmbedding(N, 6, DIMS, A)
        with torch.no_grad():
            reference.weight.copy_(scale * torch.randn(N, 6))
            ours.embedding.weight.copy_(reference.weight)
        before, task, weight = reference.weight.detach().clone(), torch.tensor([0, 2, 2, 3]), torch.randn(4, 6)
        expected, actual = reference(task), ours(task)
        torch.testing.assert_close(actual, expected)
        assert (actual.norm(dim=-1) <= 1 + 1e-5).all()
        (expected * weight).sum().backward()
        (actual * weight).sum().backward()
        torch.testing.assert_close(ours.embedding.weight.grad, reference.weight.grad)
        assert torch.equal(ours.embedding.weight, before)
        assert torch.equal(reference.weight, before) == (scale == 0.1), "max_norm was at work"

    def test_mask(self) -> None:
        mask = TaskEmbedding(N, 6, DIMS, A).mask(torch.tensor([[1, 0], [2, 3]]))
        assert mask.tolist() == [[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]]

    @pytest.mark.parametrize("dims", [(3, 1, 2), (3, 1, 2, 4), (3, 0, 2, 3), ()])
    def test_wrong_action_dims_are_one_clear_sentence(self, dims: tuple[int, ...]) -> None:
        with pytest.raises(ConfigurationError, match="one entry between 1 and 3 for each of the 4 tasks"):
            TaskEmbedding(N, 6, dims, A)


class TestWorldModel:
    @pytest.mark.parametrize("tasks", [False, True])
    @pytest.mark.parametrize("head", ["scalar", "two_hot"])
    @pytest.mark.parametrize("termination", [False, True])
    def test_shapes(self, tasks: bool, head: str, termination: bool) -> None:
        model = world_model(tasks, reward_head=head, termination=termination)
        task = torch.tensor([0, 1, 2, 3, 0, 1, 2]) if tasks else None
        z = model.encode(torch.randn(5, 7, OBS), task)
        assert z.shape == (5, 7, D)
        next_z, logits, end = model.predict(z, torch.rand(5, 7, A), task)
        assert next_z.shape == (5, 7, D)
        assert logits.shape == (5, 7, 1 if head == "scalar" else 101)
        assert (None if end is None else tuple(end.shape)) == ((5, 7, 1) if termination else None)
        next_z, reward, terminated = model(z, torch.rand(5, 7, A), task)
        assert next_z.shape == (5, 7, D)
        assert reward.shape == terminated.shape == (5, 7, 1)
        assert terminated.dtype == torch.bool
        assert termination or not terminated.any()

    def test_inputs_are_concatenated_as_latent_task_action(self) -> None:
        model, task = world_model(True), torch.tensor([0, 3])
        o, z, a, e = torch.randn(2, OBS), torch.rand(2, D), torch.rand(2, A), model.embed(task)
        torch.testing.assert_close(model.encode(o, task), model.encoder.net(torch.cat([o, e], -1)))
        next_z, logits, _ = model.predict(z, a, task)
        inputs = torch.cat([z, e, a], -1)
        torch.testing.assert_close(next_z, model.dynamics.net(inputs))
        torch.testing.assert_close(logits, model.reward.net(inputs))

    def test_padding_actions_have_no_influence(self) -> None:
        model, task, z = world_model(True, termination=True), torch.tensor([1, 2]), torch.rand(2, D)
        a = torch.rand(2, A, requires_grad=True)
        changed = a.detach().clone()
        changed[0, 1:], changed[1, 2:] = 0.7, -0.9
        for ours, other in zip(model.predict(z, a, task), model.predict(z, changed, task), strict=True):
            assert torch.equal(ours, other)
        (gradient,) = torch.autograd.grad(model(z, a, task)[1].sum(), a)
        assert (gradient != 0).tolist() == [[True, False, False], [True, True, False]]

    def test_task_and_model_must_fit(self) -> None:
        with pytest.raises(ValueError, match="needs a task index"):
            world_model(True).encode(torch.randn(2, OBS))
        with pytest.raises(ValueError, match="takes no task index"):
            world_model().encode(torch.randn(2, OBS), torch.tensor([0, 1]))

    def test_observation_statistics_are_in_front_of_the_encoder(self) -> None:
        model, o = world_model(normalize_observations=True), 4 + 3 * torch.randn(200, OBS)
        model.observation_statistics.update(o)
        standard = (o - o.mean(0)) / (o.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(model.encode(o), model.encoder(standard), rtol=1e-3, atol=1e-4)
        assert "observation_statistics.mean" in model.state_dict()

    @pytest.mark.parametrize("batch", [(7,), (5, 7)])
    def test_each_task_has_statistics_of_its_own(self, batch: tuple[int, ...]) -> None:
        model = world_model(True, normalize_observations=True)
        samples = {place: place + (1 + place) * torch.randn(200, OBS) for place in range(4)}
        for place, o in samples.items():
            model.observation_statistics.set(o, place)
        task, o = torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.randn(*batch, OBS)
        mean = torch.stack([samples[int(t)].mean(0) for t in task])
        var = torch.stack([samples[int(t)].var(0, unbiased=False) for t in task])
        standard = (o - mean) / (var + 1e-5).sqrt()
        expected = model.encoder(standard, model.embed(task))
        torch.testing.assert_close(model.encode(o, task), expected, rtol=1e-3, atol=1e-4)

    def test_a_bound_model_takes_its_own_tasks_statistics(self) -> None:
        model = world_model(True, normalize_observations=True)
        spec = WorldModelSpec(OBS, A, D, [24], [20], num_tasks=N, task_dim=6, action_dims=DIMS)
        for place in range(4):
            model.observation_statistics.set(place + torch.randn(200, OBS), place)
        bound, o = TaskWorldModel(model, spec, 2, OBS - 1, DIMS[2]), torch.randn(6, OBS - 1)
        padded = torch.nn.functional.pad(o, (0, 1))
        assert torch.equal(bound.encode(o), model.encode(padded, torch.full((6,), 2)))

    def test_real_rewards_in_the_space_of_imagined_ones(self) -> None:
        raw, symlog = world_model(reward_head="two_hot"), world_model(reward_head="two_hot", reward_space="symlog")
        reward = torch.tensor([[-3.0], [0.0], [7.0]])
        assert torch.equal(raw.reward.in_space(reward), reward)
        assert torch.equal(world_model().reward.in_space(reward), reward)
        coded = symlog.reward.codec.encode(reward)
        torch.testing.assert_close(symlog.reward.in_space(reward), symlog.reward.decode(coded.log()))

    def test_reward_space_reaches_the_policy(self) -> None:
        raw, symlog = world_model(reward_head="two_hot"), world_model(reward_head="two_hot", reward_space="symlog")
        symlog.load_state_dict(raw.state_dict())
        z, a = torch.rand(4, D), torch.rand(4, A)
        in_raw, in_symlog = raw(z, a)[1], symlog(z, a)[1]
        torch.testing.assert_close(in_raw, in_symlog.sign() * in_symlog.abs().expm1())
        assert not torch.equal(in_raw, in_symlog)

    def test_reset_parameters_is_as_built(self) -> None:
        model = world_model(True, termination=True, normalize_observations=True, dynamics={"kind": "flow"})
        model.observation_statistics.update(torch.randn(9, N, OBS))
        mean = model.observation_statistics.mean.clone()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1000)
        model.reset_parameters()
        for name, p in model.named_parameters():
            if name.endswith("ln.weight"):
                assert (p == 1).all(), name
            elif name.endswith("bias") or name == f"reward.net.{len(model.reward.net) - 1}.weight":
                assert (p == 0).all(), name
            elif name == "task.embedding.weight":
                assert 0.005 < p.abs().max() <= 0.02
            else:
                assert 0.01 < p.std() < 0.03, name
        assert torch.equal(model.observation_statistics.mean, mean), "statistics are no parameters"


# One task's view of a multi-task world model --------------------------------------------------------------------------


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
