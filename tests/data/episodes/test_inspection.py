"""Shift detection on data with known shifts: linear systems and dm_control's pendulum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from episode_cases import chunk, tasks

from pwm_torchrl.data.episodes import EpisodeRows, import_episodes, inspect_source, inspect_store
from pwm_torchrl.data.episodes.inspection import Episode, describe_shifts, find_action_shift, find_reward_shift
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.errors import ConfigurationError

NAMES = {0: "aligned", 1: "late", -1: "early"}


def linear_system(policy, reward, noise=0.05, episodes=16, length=200, o=4, a=2):
    """x' = A x + B u + noise; the reward depends on the next state, or on the state before and the action."""
    rng = np.random.RandomState(0)
    transition = 0.95 * np.linalg.qr(np.eye(o) + 0.2 * rng.randn(o, o))[0]
    transition *= np.sign(np.trace(transition))
    control = 0.3 * rng.randn(o, a)
    gain = -0.24 * np.linalg.pinv(control)
    found = []
    for _ in range(episodes):
        x, u = rng.randn(o), np.zeros(a)
        observation, action, rewards = [x], [u], [0.0]
        for _ in range(length):
            if policy == "random":
                u = rng.uniform(-1, 1, a)
            else:
                wanted = 0.9 * u if policy == "smooth" else gain @ x
                u = np.clip(wanted + 0.3 * rng.randn(a), -1, 1)
            after = transition @ x + control @ u + noise * rng.randn(o)
            rewards.append(-(after @ after) if reward == "reached" else -(x @ x) - u @ u)
            x = after
            observation.append(x)
            action.append(u)
        found.append(Episode(*(np.array(values, np.float32) for values in (observation, action, rewards))))
    return found


def shifted(episodes, actions=0, rewards=0):
    return [Episode(e.observation, np.roll(e.action, actions, 0), np.roll(e.reward, rewards)) for e in episodes]


@pytest.mark.parametrize("policy", ["random", "smooth", "feedback"])
def test_shifted_actions_are_found(policy):
    data = linear_system(policy, "reached")
    for shift, name in NAMES.items():
        assert find_action_shift(shifted(data, shift)).verdict == name


@pytest.mark.parametrize("policy", ["random", "smooth", "feedback"])
@pytest.mark.parametrize("actions", [0, 1])
def test_shifted_rewards_are_found(policy, actions):
    """For actions that are aligned or shifted."""
    data = linear_system(policy, "reached")
    for shift, name in NAMES.items():
        moved = shifted(data, actions, shift)
        assert find_reward_shift(moved, find_action_shift(moved)).verdict == name


def test_rewards_of_the_state_before_are_aligned_if_they_depend_on_actions():
    data = linear_system("random", "before")
    for shift, name in NAMES.items():
        moved = shifted(data, 0, shift)
        assert find_reward_shift(moved, find_action_shift(moved)).verdict == name


def test_rewards_of_the_state_before_are_ambiguous_without_actions():
    data = shifted(linear_system("random", "reached"), 0, 1)
    assert "or the environment rewards the state before" in find_reward_shift(data, find_action_shift(data)).reason


def without(episodes, **changes):
    return [Episode(**{**vars(e), **{k: change(getattr(e, k)) for k, change in changes.items()}}) for e in episodes]


def test_unknown():
    data = linear_system("random", "reached")
    short = [Episode(e.observation[:5], e.action[:5], e.reward[:5]) for e in data]
    still = without(data, action=np.zeros_like, reward=np.zeros_like)
    rng = np.random.RandomState(0)
    blind = without(data, observation=lambda x: rng.randn(*x.shape).astype(np.float32))
    constant = without(data, observation=np.zeros_like)
    for episodes, reason in (
        (short, "too few transitions"),
        ([], "too few transitions"),
        (still, "never vary"),
        (blind, "stands out"),
        (constant, "stands out"),
    ):
        action = find_action_shift(episodes)
        assert action.verdict == "unknown"
        assert reason in action.reason
        reward = find_reward_shift(episodes, action)
        assert reward.verdict == "unknown"
        assert reason.replace("never", "hardly ever") in reward.reason


@pytest.mark.tasks
def test_the_pendulum_of_dm_control():
    pytest.importorskip("dm_control")
    suite = import_mujoco_library("dm_control.suite", "dm-control")
    env, rng, data = suite.load("pendulum", "swingup", task_kwargs={"random": 0}), np.random.RandomState(0), []

    def flat(step):
        return np.concatenate([np.ravel(value) for value in step.observation.values()])

    for number in range(12):
        step, u = env.reset(), np.zeros(1)
        observation, action, reward = [flat(step)], [u], [0.0]
        for _ in range(200):
            push = np.sign(observation[-1][2] + 1e-3) if number % 2 else rng.uniform(-1, 1)
            u = np.clip(push + 0.3 * rng.randn(1), -1, 1)
            total = 0.0
            for _ in range(2):
                step = env.step(u)
                total += step.reward
            observation.append(flat(step))
            action.append(u)
            reward.append(total)
        data.append(Episode(*(np.array(values, np.float32) for values in (observation, action, reward))))
    for shift, name in NAMES.items():
        moved = shifted(data, shift)
        assert find_action_shift(moved).verdict == name
    for (
        shift,
        name,
    ) in NAMES.items():  # only one or two rewarded steps per turn: may be unknown, but must not be wrong
        moved = shifted(data, 0, shift)
        assert find_reward_shift(moved, find_action_shift(moved)).verdict in ("unknown", name)


# What is said of a source and of a store ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """30 episodes of cup-catch from a linear system whose rewards are stored a row late, and 2 of pendulum."""
    folder = tmp_path_factory.mktemp("inspect")
    for number, each in enumerate(linear_system("random", "reached", episodes=30, length=60, o=8)):
        values = {"action": each.action[1:], "observation": each.observation, "reward": np.roll(each.reward, 1)[1:]}
        np.savez(folder / f"{number}.npz", task="cup-catch", **values)
    torch.save(chunk(2, 9, [0, 0]), folder / "chunk.pt")
    return folder


@pytest.fixture(scope="module", params=["source", "store"])
def found(request, source, tmp_path_factory):
    if request.param == "source":
        return inspect_source(source, tasks())
    store = import_episodes(source, tmp_path_factory.mktemp("inspected") / "store", tasks())
    assert isinstance(store.episode_rows(0), EpisodeRows)
    return inspect_store(store)


def test_the_summary_of_each_task(found, source):
    pendulum, cup = found.tasks
    assert found.absent == ("cartpole-swingup",)
    assert not found.problems
    assert (pendulum.name, pendulum.episodes, pendulum.transitions, pendulum.lengths) == (
        "pendulum-swingup",
        2,
        16,
        (8, 8),
    )
    assert (cup.name, cup.episodes, cup.transitions, cup.lengths) == ("cup-catch", 30, 1800, (60, 60))
    assert (cup.observation_used, cup.observation_dim, cup.action_used, cup.action_dim) == (8, 8, 2, 2)
    returns = [np.load(source / f"{n}.npz")["reward"].sum() for n in range(30)]
    np.testing.assert_allclose(cup.return_quantiles, np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-4)


def test_shifts_are_described(found):
    pendulum, cup = found.tasks
    assert cup.action_shift.verdict == "aligned"
    assert cup.reward_shift.verdict == "late"
    assert describe_shifts(cup)[0].startswith("cup-catch: rewards are stored one row too late")
    assert describe_shifts(pendulum)[0].startswith("pendulum-swingup: cannot determine whether actions")
    assert describe_shifts(pendulum)[0].endswith("too few transitions")


def test_bad_sources_are_listed_and_the_others_inspected(tmp_path):
    torch.save(chunk(2, 9, [0, 0]), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    found = inspect_source(tmp_path, tasks())
    assert found.problems.keys() == {"b.pt"}
    assert found.tasks[0].episodes == 2
    with pytest.raises(ConfigurationError, match="is not an episode store"):
        inspect_store(tmp_path)
