"""Defects that were measured on public implementations: one test each that fails if the defect comes back."""

from __future__ import annotations

import ast
import gc
import weakref
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

import pwm_torchrl
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    RewardScale,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    policy_module,
    symexp,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss

OBS, A, D, H, B, V = 4, 2, 16, 16, 8, 8
GAMMA = 0.99
STEP_KEYS = [("next", key) for key in ("latent", "reward", "terminated")]


def world_model(**kwargs: object) -> WorldModel:
    return make_world_model(WorldModelSpec(OBS, A, D, [16], [16], **kwargs))


def slices(batch: int = B, horizon: int = H) -> TensorDict:
    size, flags = (batch, horizon), torch.zeros(batch, horizon, 1, dtype=torch.bool)
    observation = torch.randn(batch, horizon + 1, OBS)
    return TensorDict(
        observation=observation[:, :-1],
        action=2 * torch.rand(*size, A) - 1,
        next=TensorDict(
            observation=observation[:, 1:], reward=torch.randn(*size, 1), done=flags, terminated=flags, batch_size=size
        ),
        batch_size=size,
    )


def latents(batch: int = B) -> TensorDict:
    return TensorDict(latent=torch.randn(batch, D // V, V).softmax(-1).flatten(-2), batch_size=[batch])


def scripted_loss(rewards: list[float], ends: list[bool], value: float, **kwargs: object) -> PWMActorLoss:
    """The actor loss over a world model that reads its rewards and terminations from lists."""
    steps = []

    def step(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = len(steps) % len(rewards)
        steps.append(t)
        return z, rewards[t] + 0 * a[:, :1], torch.full((len(z), 1), ends[t])

    model = TensorDictModule(step, ["latent", "action"], STEP_KEYS)
    critic = TensorDictModule(lambda z: torch.full_like(z[..., :1], value), ["latent"], ["state_value"])
    return PWMActorLoss(actor_module(Actor(D, A, [8])), model, critic, horizon=len(rewards), **kwargs)


def test_metrics_history_holds_no_graph() -> None:
    """Was: a logged loss kept its epoch's autograd graph, until the host's memory was gone."""
    model, actor, critics = world_model(), Actor(D, A, [8]), CriticEnsemble(D, [8])
    losses = (
        PWMModelLoss(model),
        PWMActorLoss(actor_module(actor), world_model_module(model), value_module(critics), horizon=4),
        PWMValueLoss(critics),
    )

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()  # what autograd graphs hold for their backward pass

    def pack(_: Tensor) -> Saved:
        saved = Saved()
        alive.add(saved)
        return saved

    def epoch() -> tuple[list[Tensor], list[Tensor]]:
        data = (slices(horizon=4), latents(), latents().set("value_target", torch.randn(B, 1)))
        optimized, kept = [], []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
            for loss, batch in zip(losses, data, strict=True):
                out = loss(batch)
                optimized += [v for k, v in out.items() if k.startswith("loss_")]
                kept += [v for k, v in out.items() if not k.startswith("loss_")]
            kept += list(losses[1].rollout_and_loss(data[1])[1].values(True, True))
        return optimized, kept

    history = []
    for _ in range(3):
        optimized, kept = epoch()
        history.append(kept)
        assert len(alive) > 50, "as long as the losses live, so do their graphs"
        assert len(kept) == 12
        del optimized
        gc.collect()
        assert len(alive) == 0, "nothing that is kept owns a graph"
    assert not any(x.requires_grad or x.grad_fn for kept in history for x in kept)


class Saved:
    """Stands for a tensor in a graph, weakly countable; holding the tensor itself would make a cycle with its graph."""


def test_critic_learns_and_refuses_to_broadcast() -> None:
    """Was: [3, B, 1] − [B] broadcasts to [3, B, B], whose minimum is the mean of the targets."""
    torch.manual_seed(0)
    critics = CriticEnsemble(D, [32])
    loss = PWMValueLoss(critics)
    data = latents(256)
    target = data["latent"] @ torch.randn(D, 1)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        loss(data.clone().set("value_target", target.squeeze(-1)))
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(data.set("value_target", target))["loss_value"].backward()
        optimizer.step()
    error = (critics(data["latent"]) - target).square().mean()
    assert 1 - error / target.var() > 0.95


def test_two_hot_reward_head_is_trained() -> None:
    """Was: squared error of all logits against the scalar; the decoded reward stayed 0 without action gradient."""
    torch.manual_seed(0)
    model = world_model(reward_head="two_hot")
    loss = PWMModelLoss(model)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    data = slices(256, 2)
    data["next", "reward"] = 2 * data["action"][..., :1]
    for _ in range(250):
        optimizer.zero_grad()
        sum(loss(data).values()).backward()
        optimizer.step()
    action = data["action"][:, 0].clone().requires_grad_()
    decoded = model(model.encode(data["observation"][:, 0]), action)[1]
    assert (decoded - 2 * action[:, :1]).square().mean() < 0.1, "the variance of the reward is 1.3"
    assert torch.autograd.grad(decoded.sum(), action)[0][:, 0].mean() > 0.5


def test_bootstrap_is_discounted_h_times() -> None:
    """Was: gamma^(H+1) V(z_H)."""
    for horizon in (1, 5):
        loss = scripted_loss([0.0] * horizon, [False] * horizon, value=3.0, gamma=0.5)
        losses, rollout = loss.rollout_and_loss(latents())
        assert losses["imagined_return"] == 3 * 0.5**horizon
        assert losses["loss_actor"].item() == pytest.approx(-3 * 0.5**horizon / horizon)
        assert (rollout["next", "state_value"] == 3).all()


class TestVelocityThatCannotRepresentItsTarget:
    """Was: a velocity head that ends in SimNorm; its flow-matching loss has a floor of 1.3039."""

    def matching(self, parameterization: str) -> float:
        flow = {"kind": "flow", "parameterization": parameterization, "solver": "heun", "substeps": 2}
        loss = PWMModelLoss(
            world_model(dynamics=flow), gamma=GAMMA, flow_matching_weight=1.0, flow_matching_source="detached"
        )
        return loss(slices(64))["loss_flow_matching"].item()

    def test_the_floor_of_the_fork(self) -> None:
        floor = sum(GAMMA**t * ((t + 1) / V) ** 2 for t in range(H)) / H
        assert floor == pytest.approx(1.303935, abs=1e-6)
        assert self.matching("simnorm_velocity") >= floor

    @pytest.mark.parametrize("parameterization", ["residual_endpoint", "tangent"])
    def test_ours_start_far_below_it(self, parameterization: str) -> None:
        assert self.matching(parameterization) < 1.303935 / 5

    def test_the_default_is_not_the_forks(self) -> None:
        from pwm_torchrl.modules import ResidualEndpointFlow

        assert isinstance(world_model(dynamics={"kind": "flow"}).dynamics, ResidualEndpointFlow)


def test_padding_actions_are_masked_in_model_imagination_and_acting() -> None:
    """Was: actions beyond a task's own dimensions entered multi-task imagination."""
    model, actor = world_model(num_tasks=2, task_dim=4, action_dims=[1, 2]), Actor(D, A, [8])
    task, z, a = torch.tensor([0, 1]), latents(2)["latent"], torch.rand(2, A)
    changed = a.clone()
    changed[0, 1] = -1.0
    assert torch.equal(model.predict(z, a, task)[0], model.predict(z, changed, task)[0])
    loss = PWMActorLoss(
        actor_module(actor), world_model_module(model, task="task"), value_module(CriticEnsemble(D, [8])),
        horizon=2, action_mask=model.task.action_mask,
    )  # fmt: skip
    imagined = loss.rollout_and_loss(TensorDict(latent=z, task=task, batch_size=[2]))[1]["action"]
    acted = policy_module(model, actor, task="task")(
        TensorDict(observation=torch.randn(2, OBS), task=task, batch_size=[2])
    )
    for action in (imagined[:, 0], acted["action"]):
        assert (action != 0).tolist() == [[True, False], [True, True]]


def test_policy_acts_on_encoded_observations() -> None:
    """Was: the environment executed actions computed from imagined latents."""
    model, actor = world_model(), Actor(D, A, [8])
    policy, data = policy_module(model, actor), TensorDict(observation=torch.randn(B, OBS), batch_size=[B])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first = policy(data.clone())
        # what an imagined step would leave behind is not used: the latent is that of the observation
        stale = policy(data.clone().update(latents()))
    torch.testing.assert_close(first["action"], actor.act(model.encode(data["observation"])))
    assert torch.equal(stale["action"], first["action"])


def test_value_targets_are_lambda_returns() -> None:
    """Was: every step marked done without an environment, which makes TD(λ) one-step TD."""
    rewards = [1.0, 2.0, 3.0, 0.5]
    loss = scripted_loss(rewards, [False] * 4, value=2.0, gamma=0.9, lmbda=0.8)
    target = loss.rollout_and_loss(latents())[1]["value_target"][0].flatten()
    expected, last = [], 2.0
    for r in reversed(rewards):
        last = r + 0.9 * ((1 - 0.8) * 2.0 + 0.8 * last)
        expected.insert(0, last)
    torch.testing.assert_close(target, torch.tensor(expected))
    one_step = torch.tensor(rewards) + 0.9 * 2.0
    assert (target[:-1] - one_step[:-1]).abs().min() > 0.1


class TestRewardsLost:
    def test_rollouts_that_end_exactly_at_the_horizon_keep_their_rewards(self) -> None:
        """Was: zeroed before the final return."""
        losses, rollout = scripted_loss([1.0, 2.0, 4.0], [False, False, True], value=100.0, gamma=0.5).rollout_and_loss(
            latents()
        )
        assert losses["imagined_return"] == 1 + 0.5 * 2 + 0.25 * 4
        assert rollout["collector", "mask"].all()

    def test_rollouts_that_end_inside_the_horizon_keep_theirs(self) -> None:
        losses, _ = scripted_loss([1.0, 2.0, 4.0], [False, True, False], value=100.0, gamma=0.5).rollout_and_loss(
            latents()
        )
        assert losses["imagined_return"] == 1 + 0.5 * 2


def test_task_embedding_is_in_the_optimizer() -> None:
    """Was: in none; its gradient was never cleared and entered the clip norm."""
    model = world_model(num_tasks=2, task_dim=4, action_dims=[1, 2])
    loss, weight = PWMModelLoss(model), model.task.embedding.weight
    assert any(p is weight for p in loss.parameters())
    optimizer, before = torch.optim.SGD(loss.parameters(), lr=1.0), weight.detach().clone()
    data = slices()
    data["task"] = (torch.arange(B) % 2).unsqueeze(1).expand(B, H)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss(data).values()).backward()
        norms.append(weight.grad.norm().item())
    assert norms[0] == norms[1] > 0, "cleared between steps"
    optimizer.step()
    assert not torch.equal(weight, before)


def test_reward_normalisation_never_shifts() -> None:
    """Was: subtracted a mean, which under termination changes which policy is best."""
    scale = RewardScale(B)
    scale.update(5 + torch.randn(B, 100, 1), torch.zeros(B, 100, 1, dtype=torch.bool))
    reward = torch.tensor([[0.0], [1.0], [3.0]])
    scaled = scale(reward)
    assert scaled[0] == 0
    torch.testing.assert_close(scaled[2], 3 * scaled[1])


def test_symlog_decoding_is_not_mistaken_for_the_raw_reward() -> None:
    raw, symlog = world_model(reward_head="two_hot"), world_model(reward_head="two_hot", reward_space="symlog")
    logits = torch.randn(5, 101)
    torch.testing.assert_close(raw.reward.decode(logits), symexp(symlog.reward.decode(logits)))


def test_no_string_is_evaluated_and_no_arbitrary_pickle_loaded() -> None:
    """Was: eval of config strings, torch.load of arbitrary pickles. Reads the source of the whole package."""
    calls = []
    for path in Path(pwm_torchrl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, where = ast.unparse(node.func), f"{path.name}:{node.lineno}"
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), where
            if name == "torch.load":
                calls.append(where)
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert len(safe) == 1, where
                assert isinstance(safe[0], ast.Constant), where
                assert safe[0].value is True, where
    assert calls, "the check sees the calls there are"
