"""Every maker returns the same interface."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs.utils import RandomPolicy, check_env_specs

from pwm_torchrl.envs import env_info, make_env
from pwm_torchrl.envs.rendering import import_mujoco_library

from .conftest import play, random_actions

MAKERS = "pwm_torchrl.envs."
PENDULUM = {"_target_": MAKERS + "make_gymnasium_env", "id": "Pendulum-v1"}
HOPPER = {"_target_": MAKERS + "make_gymnasium_env", "id": "Hopper-v5"}
CHEETAH = {"_target_": MAKERS + "make_gymnasium_env", "id": "HalfCheetah-v5"}
CARTPOLE = {"_target_": MAKERS + "make_dm_control_env", "domain": "cartpole", "task": "swingup"}
WALKER = {"_target_": MAKERS + "make_dm_control_env", "domain": "walker", "task": "walk"}
ANT = {
    "_target_": MAKERS + "make_dflex_env",
    "name": "dflex_ant",
    "module": "dflex_stand_in",
}
FOREIGN = {"_target_": "torchrl.envs.GymEnv", "env_name": "Pendulum-v1"}
FOREIGN_DM = {"_target_": "torchrl.envs.DMControlEnv", "env_name": "walker", "task_name": "walk", "frame_skip": 2}
COUNTER = {"_target_": MAKERS + "make_gymnasium_env", "id": "pwm_tests/Counter-v0"}

FACTS = [  # configuration, observation, action, agent steps per episode, repeat, terminates
    (PENDULUM, 3, 1, 200, 1, False),
    (HOPPER, 11, 3, 1000, 1, True),
    (CHEETAH, 17, 6, 1000, 1, False),
    (CARTPOLE, 5, 1, 500, 2, False),
    (WALKER, 24, 6, 500, 2, False),
    (ANT, 37, 8, 1000, 1, True),
    (FOREIGN, 3, 1, 200, 1, True),
    (FOREIGN_DM, 24, 6, None, 2, True),
    (COUNTER, 3, 2, None, 1, True),
]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("cfg", "observation", "action", "length", "repeat", "terminates"), FACTS)
def test_specs_and_facts(cfg, observation, action, length, repeat, terminates, num_envs):
    env = make_env(cfg, num_envs=num_envs, seed=0)
    check_env_specs(env)
    info = env_info(env)
    assert (info.observation_dim, info.action_dim, info.num_envs) == (observation, action, num_envs)
    assert (info.episode_length, info.action_repeat, info.terminates) == (length, repeat, terminates)
    assert env.batch_size == torch.Size([num_envs])
    assert (env.action_spec.space.low == -1).all()
    assert (env.action_spec.space.high == 1).all()

    step = env.rollout(3)[:, 0]
    assert step["observation"].shape == (num_envs, observation)
    assert step["action"].shape == (num_envs, action)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        assert step[key].dtype == torch.float32
    for key in ("reward", "done", "terminated", "truncated"):
        assert step["next", key].shape == (num_envs, 1)
    env.close()


@pytest.mark.parametrize("cfg", [PENDULUM, HOPPER, CARTPOLE, ANT, FOREIGN], ids=lambda c: c["_target_"])
def test_collector_batches_are_continuous(cfg):
    """The next observation of a step is the observation of the following one, except where an episode ended."""
    env = make_env({**cfg, "episode_length": 7}, num_envs=4, seed=0)
    collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=16 * 4, total_frames=3 * 64)
    batches = list(collector)
    collector.shutdown()
    data = torch.cat(batches, 1)
    assert data.shape == (4, 48)
    done = data["next", "done"][:, :-1, 0]
    same = (data["next", "observation"][:, :-1] == data["observation"][:, 1:]).all(-1)
    assert done.sum() >= 4 * 6
    assert torch.equal(same, ~done)
    assert torch.equal(data["next", "done"], data["next", "terminated"] | data["next", "truncated"])
    if cfg in (PENDULUM, CARTPOLE):
        assert not data["next", "terminated"].any()
        assert (data["next", "truncated"][:, 6::7]).all()


def test_truncation_only_at_the_time_limit_and_termination_elsewhere():
    cheetah = make_env(CHEETAH, num_envs=1, seed=0).rollout(1000)
    assert cheetah["next", "truncated"].squeeze().nonzero().tolist() == [[999]]
    assert not cheetah["next", "terminated"].any()
    hopper = make_env(HOPPER, num_envs=1, seed=0).rollout(1000)
    assert hopper["next", "terminated"][0, -1]
    assert not hopper["next", "truncated"].any()


@pytest.mark.parametrize("repeat", [1, 3])
def test_agrees_with_gymnasium_itself(repeat):
    """Same seed and actions by hand: scaled, repeated with summed rewards, last observation and reset included."""
    cfg = {**PENDULUM, "action_repeat": repeat}
    env = make_env(cfg, num_envs=2, seed=7)
    actions = random_actions(env, 210)
    ours, _ = play(env, env.reset(), actions)
    for i in range(2):
        raw = gymnasium.make("Pendulum-v1")
        raw.reset(seed=7 + i)
        for t in range(210):
            total, truncated = 0.0, False
            for _ in range(repeat):
                last, reward, _, truncated, _ = raw.step(actions[t, i].numpy() * 2)
                total += reward
                if truncated:
                    break
            after = raw.reset()[0] if truncated else last
            expected = np.concatenate([last, [total, False, truncated], after])
            np.testing.assert_allclose(ours[t, i].numpy(), expected, rtol=1e-6)


def test_agrees_with_dm_control_itself():
    suite = import_mujoco_library("dm_control.suite", "dm-control")
    env = make_env(CARTPOLE, num_envs=2, seed=3)
    actions = random_actions(env, 20)
    ours, _ = play(env, env.reset(), actions)
    raw = suite.load("cartpole", "swingup", task_kwargs={"random": 4})
    raw.reset()
    for t in range(20):
        steps = [raw.step(actions[t, 1].numpy()) for _ in range(2)]
        observation = np.concatenate([np.ravel(value) for value in steps[-1].observation.values()])
        np.testing.assert_allclose(ours[t, 1, :5], observation, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours[t, 1, 5], sum(step.reward for step in steps), rtol=1e-5)


def test_action_repeat_sums_rewards_and_stops_at_done():
    env = make_env({**COUNTER, "action_repeat": 3}, num_envs=1, seed=0)
    data = env.rollout(10)
    assert data["next", "reward"].flatten().tolist() == [1 + 2 + 3, 4 + 5]
    assert data["next", "terminated"].flatten().tolist() == [False, True]
    assert data["next", "observation"][0, :, 0].tolist() == [3, 5]


def test_actions_are_scaled_to_the_box_and_clipped():
    env = make_env(COUNTER, num_envs=1, seed=0)
    seen, _ = play(env, env.reset(), torch.tensor([[[-1.0, 1.0]], [[0.0, 0.5]], [[-9.0, 9.0]]]))
    assert seen[:, 0, 1:3].tolist() == [[-2, 4], [1, 2.5], [-2, 4]]


def test_only_done_rows_are_reset():
    env = make_env(PENDULUM, num_envs=3, seed=0)
    tensordict = env.rollout(4)[:, -1]["next"].clone()
    before = tensordict["observation"].clone()
    tensordict["_reset"] = torch.tensor([[False], [True], [False]])
    after = env.reset(tensordict)["observation"]
    assert torch.equal((after == before).all(-1), torch.tensor([True, False, True]))


@pytest.mark.parametrize("cfg", [PENDULUM, WALKER, ANT, FOREIGN], ids=lambda c: c["_target_"])
def test_one_seed_determines_everything(cfg):
    def run(seed, num_envs=2, first=0):
        env = make_env({**cfg, "episode_length": 12}, num_envs=num_envs, seed=seed)
        actions = random_actions(env, 30) if num_envs == 2 else random_actions_of(first)
        torch.rand(3)  # draws elsewhere must not matter
        return play(env, env.reset(), actions)[0]

    def random_actions_of(row):
        two = make_env(cfg, num_envs=2, seed=0)
        return random_actions(two, 30)[:, row : row + 1]

    first = run(5)
    assert torch.equal(first, run(5))
    assert not torch.equal(first, run(6))
    assert not torch.equal(first[0, 0], first[0, 1])
    if cfg is not ANT:  # dflex seeds a batch, not its rows
        assert torch.equal(first[:, 1:], run(6, num_envs=1, first=1))


def test_reseeding_repeats_the_run():
    env = make_env(PENDULUM, num_envs=2, seed=0)
    actions = random_actions(env, 5)
    first, _ = play(env, env.reset(), actions)
    env.set_seed(0)
    assert torch.equal(first, play(env, env.reset(), actions)[0])


def test_name_of_the_configuration_is_used():
    assert env_info(make_env({**PENDULUM, "name": "pendulum"}, num_envs=1, seed=0)).name == "pendulum"
