"""Meta-World's tasks as MT80 has them, against Meta-World itself."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("metaworld")

import metaworld
from metaworld.policies import ENV_POLICY_MAP
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import env_info, env_state_support, load_env_state, make_env, render_frame, save_env_state
from pwm_torchrl.envs.tasks import make_metaworld_env
from pwm_torchrl.errors import ConfigurationError

TASKS = ["door-open", "pick-place", "stick-pull", "reach"]


def random_actions(steps, num_envs=1, seed=0):
    return torch.rand(steps, num_envs, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def play(env, tensordict, actions):
    """Everything that came out, stacked over time, and the next TensorDict; resets where an episode ends."""
    rows = []
    for action in actions:
        tensordict["action"] = action
        step, tensordict = env.step_and_maybe_reset(tensordict)
        pieces = [step["next", key].double() for key in ("observation", "reward", "success", "truncated")]
        pieces += [tensordict[key].double() for key in ("observation", "success")]
        rows.append(torch.cat(pieces, -1))
    return torch.stack(rows), tensordict


def official(task, goal):
    """Meta-World's own environment for multi-task learning, with one of the goals that its benchmarks fix."""
    kind = metaworld.ALL_V3_ENVIRONMENTS[f"{task}-v3"]
    env = kind()
    fixed = {"env_cls": kind, "rand_vec": goal, "partially_observable": False}
    env.set_task(metaworld.Task(env_name=f"{task}-v3", data=pickle.dumps(fixed)))
    return env


@pytest.mark.parametrize("task", TASKS)
def test_agrees_with_metaworld_itself(task):
    """Goals are in the observation, a zero action follows the reset, two steps are one with their rewards summed."""
    env = make_metaworld_env(task)
    tensordict = env.reset()
    theirs = official(task, env._env.envs[0].simulator._last_rand_vec)
    theirs.reset()
    expected = theirs.step(np.zeros(4, np.float32))[0]
    np.testing.assert_allclose(tensordict["observation"][0], expected, rtol=1e-5, atol=1e-6)
    assert (expected[-3:] != 0).any()
    for action in random_actions(20):
        tensordict["action"] = action
        tensordict = env.step(tensordict)["next"]
        steps = [theirs.step(action[0].numpy()) for _ in range(2)]
        np.testing.assert_allclose(tensordict["observation"][0], steps[-1][0], rtol=1e-5, atol=1e-6)
        assert tensordict["reward"].item() == pytest.approx(sum(step[1] for step in steps), rel=1e-5)
        assert tensordict["success"].item() == bool(steps[-1][-1]["success"])
    env.close()


@pytest.mark.filterwarnings("ignore:Constant.s. may be too high:UserWarning")  # Meta-World's policies
@pytest.mark.parametrize("task", ["drawer-close", "button-press"])
def test_success_is_told(task):
    """Meta-World's scripted policy solves the task; at the start it is not solved."""
    env, policy = make_metaworld_env(task, num_envs=1, seed=2), ENV_POLICY_MAP[f"{task}-v3"]()
    for _ in range(2):
        tensordict, solved = env.reset(), []
        assert tensordict["success"].tolist() == [[False]]
        while not solved or not (solved[-1] or tensordict["done"].item()):
            action = policy.get_action(tensordict["observation"][0].double().numpy())
            tensordict["action"] = torch.tensor(np.clip(action, -1, 1), dtype=torch.float32)[None]
            tensordict = env.step(tensordict)["next"]
            solved.append(tensordict["success"].item())
        assert solved[-1] is True
        assert len(solved) > 3
    env.close()


@pytest.mark.parametrize("task", ["door-open", "stick-pull"])
def test_same_continuation(task):
    """Save in an episode, go on across a reset, load, go on again: equal to the bit, in this and other objects."""
    env = make_metaworld_env(task, seed=3, episode_length=16)
    assert env_state_support(env).startswith("exact")
    actions = random_actions(22)
    _, present = play(env, env.reset(), actions[:6])
    file = io.BytesIO()
    torch.save(save_env_state(env), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    start = present.clone()
    expected, _ = play(env, present, actions[6:])
    fresh, used = (make_metaworld_env(task, seed=seed, episode_length=16) for seed in (3, 99))
    play(used, used.reset(), actions[:10])
    for other in (env, fresh, used):
        load_env_state(other, state)
        assert torch.equal(play(other, start.clone(), actions[6:])[0], expected)


def test_one_seed_determines_everything():
    def run(seed, elsewhere):
        np.random.seed(elsewhere)  # numpy's global stream must not matter
        env = make_metaworld_env("push", num_envs=2, seed=seed, episode_length=5)
        return play(env, env.reset(), random_actions(11, 2))[0]

    first, again, other = run(5, 0), run(5, 1), run(6, 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])
    goals = first[[4, 9], 0, -4:-1]  # of the episodes that begin there
    assert goals.any(-1).all()
    assert not torch.equal(goals[0], goals[1])


def test_specs_and_facts():
    env = make_metaworld_env("reach", num_envs=2)
    check_env_specs(env)
    info = env_info(env)
    assert (info.name, info.observation_dim, info.action_dim) == ("mw-reach", 39, 4)
    assert (info.episode_length, info.action_repeat, info.terminates) == (100, 2, False)


def test_beyond_metaworlds_own_limit():
    """Meta-World refuses to go on after 500 steps; the limit here counts agent steps."""
    env = make_metaworld_env("reach", action_repeat=2, episode_length=260)
    data = env.rollout(300)
    assert data["next", "truncated"][0, :, 0].nonzero().flatten().tolist() == [259]


def test_pictures_are_asked_for_beforehand():
    with pytest.raises(ConfigurationError, match="without render=True"):
        render_frame(make_metaworld_env("reach"))


def test_unknown_task():
    with pytest.raises(ConfigurationError) as caught:
        make_env({"_target_": "pwm_torchrl.envs.tasks.make_metaworld_env", "task": "raech"}, num_envs=1, seed=0)
    assert str(caught.value).startswith("env.task='raech' is not a task of Meta-World: did you mean reach")
