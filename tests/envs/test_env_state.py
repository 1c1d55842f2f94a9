"""Saved environments go on to the bit."""

from __future__ import annotations

import io

import pytest
import torch

from pwm_torchrl.envs import env_state_support, load_env_state, make_env, save_env_state
from pwm_torchrl.errors import ConfigurationError

from .conftest import play, random_actions

GYM, DM = "pwm_torchrl.envs.make_gymnasium_env", "pwm_torchrl.envs.make_dm_control_env"
CASES = [
    {"_target_": GYM, "id": "Pendulum-v1", "episode_length": 33},
    {"_target_": GYM, "id": "MountainCarContinuous-v0", "episode_length": 33},
    {"_target_": GYM, "id": "Hopper-v5"},
    {"_target_": GYM, "id": "Ant-v5", "episode_length": 33},
    {"_target_": GYM, "id": "HalfCheetah-v5", "episode_length": 33, "action_repeat": 2},
    {"_target_": DM, "domain": "cartpole", "task": "swingup", "episode_length": 33},
    {"_target_": DM, "domain": "reacher", "task": "easy", "episode_length": 33},
    {"_target_": DM, "domain": "hopper", "task": "hop", "episode_length": 33},
]


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cfg", CASES, ids=lambda c: c.get("id") or f"{c['domain']}-{c['task']}")
def test_same_continuation(cfg):
    """Save, 50 random actions across a reset, load, the same actions: equal to the bit, in this and other objects."""
    env = make_env(cfg, num_envs=2, seed=3)
    assert env_state_support(env).startswith("exact")
    actions = random_actions(env, 60)
    _, present = play(env, env.reset(), actions[:10])
    state = _through_a_file(save_env_state(env))
    start = present.clone()
    expected, _ = play(env, present, actions[10:])
    assert expected[..., -1 - start["observation"].shape[-1]].any() or cfg.get("id") == "Hopper-v5"

    load_env_state(env, state)
    assert torch.equal(play(env, start.clone(), actions[10:])[0], expected)
    fresh = make_env(cfg, num_envs=2, seed=3)
    load_env_state(fresh, state)
    assert torch.equal(play(fresh, start.clone(), actions[10:])[0], expected)
    used = make_env(cfg, num_envs=2, seed=99)
    play(used, used.reset(), actions[:40])
    load_env_state(used, state)
    assert torch.equal(play(used, start.clone(), actions[10:])[0], expected)


def test_partial_reset_right_after_loading():
    """Rows that a partial reset leaves alone come from the saved state, too."""
    env = make_env(CASES[0], num_envs=2, seed=0)
    _, present = play(env, env.reset(), random_actions(env, 5))
    state = save_env_state(env)
    fresh = make_env(CASES[0], num_envs=2, seed=8)
    load_env_state(fresh, state)
    request = present.clone()
    request["_reset"] = torch.tensor([[True], [False]])
    assert torch.equal(fresh.reset(request)["observation"][1], present["observation"][1])


def test_unsaved_first_seed_survives():
    """A state taken before the first reset keeps the seed that the reset will use."""
    env = make_env(CASES[0], num_envs=2, seed=4)
    state = save_env_state(env)
    other = make_env(CASES[0], num_envs=2, seed=5)
    load_env_state(other, state)
    assert torch.equal(other.reset()["observation"], env.reset()["observation"])


def test_another_number_of_environments_is_refused():
    state = save_env_state(make_env(CASES[0], num_envs=2, seed=0))
    with pytest.raises(ConfigurationError, match=r"2 environments and this run 3 \(env.num_envs\)"):
        load_env_state(make_env(CASES[0], num_envs=3, seed=0), state)


def test_another_simulation_is_refused():
    state = save_env_state(make_env(CASES[2], num_envs=2, seed=0))
    with pytest.raises(ConfigurationError, match="one of Hopper-v5 and this environment is Ant-v5"):
        load_env_state(make_env(CASES[3], num_envs=2, seed=0), state)


@pytest.mark.parametrize(
    "cfg",
    [
        {"_target_": "torchrl.envs.GymEnv", "env_name": "Pendulum-v1"},
        {
            "_target_": "pwm_torchrl.envs.make_dflex_env",
            "name": "hopper",
            "module": "dflex_stand_in",
        },
        {"_target_": GYM, "id": "pwm_tests/Counter-v0"},
    ],
    ids=["foreign", "dflex", "unknown"],
)
def test_what_cannot_be_saved_says_so(cfg):
    env = make_env(cfg, num_envs=1, seed=0)
    assert save_env_state(env) is None
    assert env_state_support(env).startswith("none: ")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_env_state(env, {})
