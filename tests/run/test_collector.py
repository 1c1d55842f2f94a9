"""ResumableCollector: what is executed, what is recorded, and how it continues."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from training_cases import CARTPOLE, CLOCKWORK, PENDULUM, Bench, config

from pwm_torchrl.algorithm.build import Facts, build_networks
from pwm_torchrl.envs import make_env
from pwm_torchrl.modules import policy_module
from pwm_torchrl.run.collector import (
    EpisodeReturns,
    ResumableCollector,
    RunRNGState,
    evaluation_env_seed,
    fresh_env_seed,
    preserved_generators,
    seed_everything,
    training_env_seed,
)


def build(env_cfg=PENDULUM, steps=4, seed=0, random_steps=0, num_envs=2, facts=(3, 1)):
    """A collector with an untrained policy, and its networks."""
    torch.manual_seed(seed)
    env = make_env(env_cfg, num_envs=num_envs, seed=seed)
    networks = build_networks(config(), Facts(*facts, False))
    policy = policy_module(networks.model, networks.actor, action_spec=env.action_spec_unbatched)
    return ResumableCollector(env, policy, steps, random_steps), networks


def collect(collector, batches):
    """The next batches, joined along time; random ones lack what the policy writes."""
    iterator = iter(collector)
    found = [next(iterator).clone() for _ in range(batches)]
    common = set.intersection(*(set(batch.keys()) for batch in found))
    return torch.cat([batch.select(*common) for batch in found], 1)


def pendulum_step(observation, action):
    """Pendulum-v1 written out: next observation and reward."""
    cos, sin, speed = observation.double().unbind(-1)
    angle, torque = torch.atan2(sin, cos), 2 * action.double().squeeze(-1)
    reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = (speed + (15 * torch.sin(angle) + 3 * torque) * 0.05).clamp(-8, 8)
    angle = angle + speed * 0.05
    return torch.stack([angle.cos(), angle.sin(), speed], -1), reward.unsqueeze(-1)


class TestActing:
    def test_on_the_encoded_real_observation_of_every_step(self):
        """Not on latents that the model imagined from the first one."""
        collector, networks = build()
        batch = collect(collector, 3)
        with torch.no_grad():
            latent = networks.model.encode(batch["observation"])
            loc, scale = networks.actor(latent)
        torch.testing.assert_close(batch["latent"], latent)
        torch.testing.assert_close(batch["loc"], loc)
        noise = (torch.atanh(batch["action"].double()) - loc) / scale
        # With independent standard normal noise: 24 numbers, mean and spread within wide bounds.
        assert abs(noise.mean()) < 0.8
        assert 0.5 < noise.std() < 1.6

    def test_the_environment_executes_the_recorded_actions(self):
        """And what is recorded as next is its true successor, at the end of an episode too."""
        batch = collect(build()[0], 18)
        done = batch["next", "done"].squeeze(-1)
        assert done.nonzero().tolist() == [[n, t] for n in range(2) for t in (29, 59)]
        following, reward = pendulum_step(batch["observation"], batch["action"])
        torch.testing.assert_close(batch["next", "observation"].double(), following, rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["next", "reward"].double(), reward, rtol=0, atol=1e-4)

    def test_episodes_follow_each_other(self):
        batch = collect(build()[0], 18)
        same = torch.isclose(batch["next", "observation"][:, :-1], batch["observation"][:, 1:]).all(-1)
        assert torch.equal(same, ~batch["next", "done"].squeeze(-1)[:, :-1])

    def test_a_time_limit_is_no_termination(self):
        """Pendulum never terminates: the value after its last step counts."""
        cfg = {**PENDULUM, "episode_length": 200}
        batch = collect(build(cfg, steps=100)[0], 5)
        done = batch["next", "done"].squeeze(-1)
        assert done.nonzero().tolist() == [[n, t] for n in range(2) for t in (199, 399)]
        assert not batch["next", "terminated"].any()
        assert torch.equal(batch["next", "truncated"].squeeze(-1), done)
        bench = Bench(config(), batch.select("observation", "action", "next"))
        slices = bench.replay.sample_slices(200)
        assert slices["next", "done"].any()
        assert not slices["next", "terminated"].any()
        assert not bench.losses.model.read(slices).terminated.any()

    def test_termination_is_recorded(self):
        batch = collect(build(CLOCKWORK)[0], 4)
        ends = batch["next", "terminated"].squeeze(-1)
        assert ends.nonzero().tolist() == [[n, t] for n in range(2) for t in (6, 13)]
        assert (batch["next", "observation"][..., 1][ends] == 7).all()
        assert not batch["next", "truncated"].any()

    def test_training_reaches_the_policy(self):
        """The collector acts with the network that the optimizer changes, not with a copy."""
        collector, networks = build()
        iterator = iter(collector)
        next(iterator)
        optimizer = torch.optim.Adam(networks.actor.parameters(), lr=1.0, fused=True)
        for p in networks.actor.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        batch = next(iterator)
        with torch.no_grad():
            loc, scale = networks.actor(networks.model.encode(batch["observation"]))
        torch.testing.assert_close(batch["loc"], loc)
        torch.testing.assert_close(batch["scale"], scale)

    def test_random_steps_come_first(self):
        collector, networks = build(steps=50, random_steps=100)
        with torch.no_grad():
            networks.actor.net[-1].bias.fill_(6.0)
        first, second = collect(collector, 2).split(50, dim=1)
        assert abs(first["action"].mean()) < 0.3
        assert first["action"].std() == pytest.approx(1 / math.sqrt(3), abs=0.1)
        assert second["action"].min() > 0.9

    def test_no_gradient_graph(self):
        batch = collect(build()[0], 1)
        assert not [key for key, value in batch.items(True, True) if value.requires_grad]


class TestState:
    @pytest.mark.parametrize(
        ("env_cfg", "facts"), [(PENDULUM, (3, 1)), (CARTPOLE, (5, 1))], ids=["pendulum", "cartpole"]
    )
    def test_continues_in_the_middle_of_an_episode(self, env_cfg, facts):
        collector, _ = build(env_cfg, facts=facts)
        iterator = iter(collector)
        for _ in range(3):
            next(iterator)
        state, generator = collector.state_dict(), torch.get_rng_state()
        expected = torch.cat([next(iterator).clone() for _ in range(9)], 1)
        again, _ = build(env_cfg, facts=facts)
        again.load_state_dict(state)
        torch.set_rng_state(generator)
        found = collect(again, 9)
        assert again.resumed_exactly
        assert expected["next", "done"].any()
        for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done")):
            assert torch.equal(found[key], expected[key]), key

    def test_frames_continue(self):
        collector, _ = build(random_steps=24)
        collect(collector, 2)
        again, networks = build(random_steps=24)
        again.load_state_dict(collector.state_dict())
        with torch.no_grad():
            networks.actor.net[-1].bias.fill_(6.0)
        # 16 of the 24 random steps are over.
        actions = collect(again, 2)["action"]
        assert actions[:, :4].min() < 0.9
        assert actions[:, 4:].min() > 0.9

    def test_an_environment_that_cannot_be_saved_starts_over(self):
        collector, _ = build(CLOCKWORK)
        collect(collector, 1)
        state = collector.state_dict()
        assert state["env"] is None
        again, _ = build(CLOCKWORK)
        again.load_state_dict(state)
        assert not again.resumed_exactly
        assert collect(again, 1)["observation"][:, 0, 1].tolist() == [0.0, 0.0]

    def test_forgotten_state(self):
        collector, _ = build()
        collect(collector, 1)
        collector.forget_env_state()
        assert collector.state_dict()["env"] is None


class TestEpisodeReturns:
    def test_sums_over_batches(self):
        batch = collect(build(CLOCKWORK)[0], 7)
        rewards, done = batch["next", "reward"].squeeze(-1).double(), batch["next", "done"].squeeze(-1)
        expected = [rewards[n, 7 * e : 7 * e + 7].sum().item() for e in range(4) for n in range(2)]
        assert done.sum() == len(expected)
        returns = EpisodeReturns(2)
        found = torch.cat([returns.update(part) for part in batch.split(5, dim=1)])
        assert found.tolist() == pytest.approx(expected)

    def test_state(self):
        batch = collect(build(CLOCKWORK)[0], 3)
        first, second = EpisodeReturns(2), EpisodeReturns(2)
        first.update(batch[:, :5])
        second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
        assert torch.equal(first.update(batch[:, 5:]), second.update(batch[:, 5:]))


# Seeds ----------------------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 1, 20_240_501, 2**40])
def test_environment_seeds_are_apart_and_fit_simulators(seed: int) -> None:
    seeds = [training_env_seed(seed), evaluation_env_seed(seed), fresh_env_seed(seed)]
    assert len(set(seeds)) == 3
    assert all(0 <= s <= 2**32 - 2500 for s in seeds)


def test_evaluations_of_a_run_start_apart() -> None:
    seeds = [evaluation_env_seed(7, epoch, 10) + i for epoch in range(250) for i in range(10)]
    assert len(set(seeds)) == 2500
    assert min(seeds) == evaluation_env_seed(7)
    assert max(seeds) < fresh_env_seed(7)
    assert evaluation_env_seed(7, 250, 10) == evaluation_env_seed(7)


def test_generators_survive_what_happens_in_between() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with preserved_generators():
        seed_everything(99)
        draws()
    assert draws() == expected


def test_the_state_of_absent_accelerators_is_left_out_with_a_warning() -> None:
    seed_everything(5)
    state = RunRNGState().state_dict()
    state["torch_cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    expected = draws()
    with pytest.warns(UserWarning, match=rf"{torch.cuda.device_count() + 1} CUDA devices"):
        RunRNGState().load_state_dict(state)
    assert draws() == expected
