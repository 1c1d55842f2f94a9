"""Evaluation: returns come from the environment, twice the same, and nothing else notices."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.envs import SerialEnv, TransformedEnv
from training_cases import CARTPOLE, CLOCKWORK, DFLEX, PENDULUM, Clockwork, config

from pwm_torchrl.algorithm.build import Facts, build_networks
from pwm_torchrl.config import TrainingConfig
from pwm_torchrl.envs import make_env
from pwm_torchrl.modules import policy_module
from pwm_torchrl.run.evaluation import Episodes, film, open_loop_errors, play, random_action


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def build(env_cfg=PENDULUM, facts=(3, 1), num_envs=3):
    torch.manual_seed(0)
    env = make_env(env_cfg, num_envs=num_envs, seed=0)
    networks = build_networks(config(), Facts(*facts, False))
    return env, networks, policy_module(networks.model, networks.actor, action_spec=env.action_spec_unbatched)


def generators():
    return torch.get_rng_state(), str(random.getstate()), str(np.random.get_state())


class TestPlay:
    def test_returns_are_the_environments(self):
        """Against a loop over gymnasium itself, one environment at a time."""
        import gymnasium

        env, networks, policy = build({**PENDULUM, "episode_length": 200})
        episodes = play(env, policy, seed=7)
        for n in range(3):
            raw, total = gymnasium.make("Pendulum-v1"), 0.0
            observation, _ = raw.reset(seed=7 + n)
            for _ in range(200):
                with torch.no_grad():
                    latent = networks.model.encode(torch.as_tensor(observation).unsqueeze(0))
                    action = torch.tanh(networks.actor(latent)[0])[0]
                observation, reward, *_ = raw.step(2 * action.numpy())
                total += reward
            assert episodes.returns[n].item() == pytest.approx(total, rel=1e-3)

    def test_the_reward_head_has_no_say(self):
        env, networks, policy = build()
        before = play(env, policy, seed=3).returns
        with torch.no_grad():
            for p in networks.model.reward.parameters():
                p.normal_()
            for p in networks.model.dynamics.parameters():
                p.normal_()
        assert torch.equal(play(env, policy, seed=3).returns, before)

    def test_twice_the_same_and_another_seed_differs(self):
        env, _, policy = build()
        first = play(env, policy, seed=3)
        play(env, random_action(env), seed=4)
        second = play(env, policy, seed=3)
        for key in ("observation", "action", "next_observation", "reward", "valid"):
            assert torch.equal(getattr(first, key), getattr(second, key))
        assert (play(env, policy, seed=100).returns != first.returns).all()

    def test_acts_without_noise(self):
        env, networks, policy = build()
        episodes = play(env, policy, seed=3)
        with torch.no_grad():
            expected = torch.tanh(networks.actor(networks.model.encode(episodes.observation))[0])
        torch.testing.assert_close(episodes.action, expected)

    def test_counts_the_first_episode_only(self):
        env, _, policy = build(CLOCKWORK)
        episodes = play(env, policy, seed=5000)
        assert episodes.valid.shape == (7, 3, 1)
        assert episodes.valid.all()
        # a longer episode beside a shorter one: rows of the next episode do not count
        valid = torch.tensor([True, True, False, False]).view(4, 1, 1)
        reward = torch.tensor([1.0, 2.0, 50.0, 50.0]).view(4, 1, 1)
        assert Episodes(reward, reward, reward, reward, valid).returns.tolist() == [3.0]

    def test_environments_that_end_at_different_times(self):
        """Each environment's rewards up to its own end, though the shorter ones have begun again."""

        class Lives(nn.Module):
            def forward(self, td):
                return td.set("action", torch.full((3, 1), 0.5))

        env, _, _ = build(CLOCKWORK)
        # The sub-environments live 4, 7 and 9 steps.
        for index, life in enumerate((4, 7, 9)):
            find(env, index).life = life
        episodes = play(env, Lives(), seed=5000)
        assert episodes.valid.squeeze(-1).sum(0).tolist() == [4, 7, 9]
        starts = episodes.observation[0, :, 0].double()
        expected = torch.tensor([4.0, 7.0, 9.0]) * (0.5 + starts)
        torch.testing.assert_close(episodes.returns, expected.double(), rtol=1e-5, atol=0)

    def test_the_last_observation_is_the_episodes_own(self):
        env, _, policy = build()
        episodes = play(env, policy, seed=3)
        assert torch.equal(episodes.next_observation[:-1], episodes.observation[1:])
        assert len(episodes.observation) == 30

    @pytest.mark.parametrize("act", ["policy", "random"])
    @pytest.mark.parametrize(
        ("env_cfg", "facts"),
        [(PENDULUM, (3, 1)), (CARTPOLE, (5, 1)), (DFLEX, (11, 3)), (CLOCKWORK, (3, 1))],
        ids=["pendulum", "cartpole", "dflex", "clockwork"],
    )
    def test_leaves_the_global_generators_alone(self, env_cfg, facts, act):
        env, _, policy = build(env_cfg, facts)
        before = generators()
        play(env, policy if act == "policy" else random_action(env), seed=5000)
        after = generators()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    def test_default_number_of_episodes(self):
        assert TrainingConfig().eval_episodes >= 10


class TestRandomAction:
    def test_uniform_and_the_same_every_time(self):
        env, _, _ = build(num_envs=20)
        runs = []
        for _ in range(2):
            episodes = play(env, random_action(env), seed=1)
            runs.append(episodes.action)
        assert torch.equal(*runs)
        assert runs[0].min() < -0.95
        assert runs[0].max() > 0.95
        assert abs(runs[0].mean()) < 0.1
        assert runs[0].std() == pytest.approx(1 / 3**0.5, abs=0.05)

    def test_pendulum_scores_as_it_is_known_to(self):
        env, _, _ = build({**PENDULUM, "episode_length": 200}, num_envs=20)
        assert -1500 < play(env, random_action(env), seed=1).returns.mean() < -900


class Head(nn.Module):
    """A reward head in units of ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def decode(self, logits):
        return logits * self.scale


class Perfect(nn.Module):
    """The true model of :func:`drift`; observations are latents. ``bias`` spoils it."""

    def __init__(self, bias: float = 0.0, after: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))
        self.reward = Head()

    def encode(self, observation, task):
        return observation

    def predict(self, latent, action, task):
        return 0.9 * latent + action + self.bias, latent.sum(-1, keepdim=True) + action[..., :1] + self.bias, None


def drift(steps: int, envs: int) -> Episodes:
    """Episodes of o' = 0.9 o + a with reward sum(o) + a_0."""
    o, action = [torch.randn(envs, 2)], torch.randn(steps, envs, 2)
    for a in action:
        o.append(0.9 * o[-1] + a)
    observation = torch.stack(o)
    reward = observation[:-1].sum(-1, keepdim=True) + action[..., :1]
    valid = torch.ones(steps, envs, 1, dtype=torch.bool)
    return Episodes(observation[:-1], action, observation[1:], reward, valid)


ERRORS = {"latent_mse", "latent_mse_last", "reward_nmse", "reward_nmse_last"}


class TestOpenLoopErrors:
    def test_zero_for_the_true_model(self):
        errors = open_loop_errors(Perfect(), drift(12, 3), horizon=5)
        assert set(errors) == ERRORS
        assert all(abs(value) < 1e-10 for value in errors.values())

    def test_values_for_a_biased_model(self):
        """The latent error at step t is bias · (1 + 0.9 + ... + 0.9^t); nothing is fed back."""
        episodes = drift(4, 3)
        errors = open_loop_errors(Perfect(0.5), episodes, horizon=4)
        latent = [(0.5 * sum(0.9**i for i in range(t + 1))) ** 2 for t in range(4)]
        assert errors["latent_mse"] == pytest.approx(sum(latent) / 4, rel=1e-4)
        assert errors["latent_mse_last"] == pytest.approx(latent[-1], rel=1e-4)
        off = [(2 * 0.5 * sum(0.9**i for i in range(t)) + 0.5) ** 2 for t in range(4)]
        variance = episodes.reward.var().item()
        assert errors["reward_nmse"] == pytest.approx(sum(off) / 4 / variance, rel=1e-4)
        assert errors["reward_nmse_last"] == pytest.approx(off[-1] / variance, rel=1e-4)

    def test_steps_after_an_end_are_ignored(self):
        episodes = drift(12, 3)
        episodes.valid[7:, 1] = False
        for name in ("observation", "next_observation", "reward"):
            getattr(episodes, name)[7:, 1] = 1e3
        assert all(abs(value) < 1e-10 for value in open_loop_errors(Perfect(), episodes, 5).values())

    def test_nothing_where_no_episode_is_long_enough(self):
        assert open_loop_errors(Perfect(), drift(4, 3), horizon=5) == {}
        episodes = drift(12, 3)
        episodes.valid[3:] = False
        assert open_loop_errors(Perfect(), episodes, horizon=5) == {}

    def test_a_single_reward_has_no_variance_to_compare_with(self):
        errors = open_loop_errors(Perfect(0.5), drift(1, 1), horizon=1)
        assert set(errors) == {"latent_mse", "latent_mse_last"}
        assert all(np.isfinite(list(errors.values())))

    def test_reward_scale(self):
        """A model trained on scaled rewards is compared with scaled rewards."""

        class Scaled(Perfect):
            def predict(self, *args, **kwargs):
                z, r, end = super().predict(*args, **kwargs)
                return z, 0.1 * r, end

        errors = open_loop_errors(Scaled(), drift(12, 3), 5, torch.tensor([0.1]))
        assert errors["reward_nmse"] < 1e-10

    def test_a_head_in_units_of_its_own(self):
        """Rewards are compared in the environment's unit, whatever the unit of the head."""

        class InUnits(Perfect):
            def predict(self, *args, **kwargs):
                z, r, end = super().predict(*args, **kwargs)
                return z, r / 0.02, end

        model = InUnits(0.5)
        model.reward = Head(0.02)
        episodes = drift(12, 3)
        plain, other = open_loop_errors(Perfect(0.5), episodes, 5), open_loop_errors(model, episodes, 5)
        assert other == pytest.approx(plain, rel=1e-4)

    @pytest.mark.parametrize("changes", [{}, {"model.reward_head": "two_hot"}, {"model.termination_head": True}])
    def test_on_a_real_model(self, changes):
        torch.manual_seed(0)
        networks = build_networks(config(changes), Facts(3, 1, False))
        env, _, policy = build()
        errors = open_loop_errors(networks.model, play(env, policy, seed=0), 4)
        assert set(errors) == ERRORS
        assert all(np.isfinite(list(errors.values())))


def test_film_shows_one_episode():
    env = make_env({**PENDULUM, "episode_length": 4}, num_envs=1, seed=0, render=True)
    act = random_action(env)
    frames = list(film(env, act, 0))
    assert len(frames) == 4
    assert frames[0].dtype == np.uint8
    assert frames[0].shape[2] == 3
    assert any((a != b).any() for a, b in zip(frames, frames[1:], strict=False))


def find(env, index: int) -> Clockwork:
    """The gymnasium environment at a position of a serial batch."""
    while not isinstance(env, SerialEnv):
        env = env.base_env
    member = env._envs[index]
    while not isinstance(member, Clockwork):
        member = member.base_env if isinstance(member, TransformedEnv) else member._env
    return member
