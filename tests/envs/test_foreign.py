"""A user's own environment, and what is refused."""

from __future__ import annotations

import pickle
import sys
import types

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import EnvironmentFault, env_info, make_dm_control_env, make_env, make_gymnasium_env, report_env
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

from .conftest import Counter, play


@pytest.fixture
def user_module():
    """An importable module ``my_pkg`` for a test to fill."""
    module = types.ModuleType("my_pkg")
    sys.modules["my_pkg"] = module
    yield module
    del sys.modules["my_pkg"]


def test_dict_observations_concatenate_in_order(user_module):
    user_module.make_env = lambda: GymWrapper(Counter())
    env = make_env({"_target_": "my_pkg.make_env", "name": "mine"}, num_envs=2, seed=0)
    check_env_specs(env)
    seen, _ = play(env, env.reset(), torch.tensor([[[-1.0, 1.0]] * 2, [[0.0, 0.0]] * 2]))
    order = list(env.base_env.observation_spec.keys(True, True))
    expected = {"count": [1.0], "action": [-2.0, 4.0]}
    assert seen[0, 0, :3].tolist() == [value for key in order for value in expected[key]]
    chosen = {"_target_": "my_pkg.make_env", "observation_keys": ["count"]}
    assert env_info(make_env(chosen, num_envs=1, seed=0)).observation_dim == 1
    with pytest.raises(ConfigurationError, match=r"env.observation_keys names 'speed'"):
        make_env({**chosen, "observation_keys": ["speed"]}, num_envs=1, seed=0)


def test_maker_gets_what_it_names(user_module):
    got = []

    def make(flavour, seed, render=True, **rest):
        got.append((flavour, seed, render, rest))
        return GymWrapper(gymnasium.make("Pendulum-v1"))

    user_module.make_env = make
    cfg = {"_target_": "my_pkg.make_env", "flavour": "mint", "extra": 3, "name": "mine", "num_envs": 2}
    make_env(cfg, num_envs=2, seed=10)
    assert {entry[1] for entry in got} == {10, 11}
    assert all(entry[0] == "mint" and entry[2] is False and entry[3] == {"extra": 3} for entry in got)


def test_batched_maker_and_episode_length(user_module):
    def make(num_envs, device):
        vector = gymnasium.make_vec(
            "Pendulum-v1", num_envs=num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "Disabled"}
        )
        return GymWrapper(vector, device=device)

    user_module.make_env = make
    cfg = {"_target_": "my_pkg.make_env", "episode_length": 6, "terminates": False}
    env = make_env(cfg, num_envs=3, seed=0)
    check_env_specs(env)
    assert (env_info(env).episode_length, env_info(env).terminates) == (6, False)
    data = env.rollout(20, break_when_any_done=False)
    assert data["next", "truncated"][0, :, 0].nonzero().flatten().tolist() == [5, 11, 17]
    assert not data["next", "terminated"].any()


def test_stateless_environment_without_truncated():
    cfg = {"_target_": "torchrl.envs.PendulumEnv", "observation_keys": ["th", "thdot"], "terminates": False}
    env = make_env(cfg, num_envs=2, seed=0)
    check_env_specs(env)
    assert env.rollout(3)["next", "truncated"].shape == (2, 3, 1)


@pytest.mark.parametrize("maker", ["pwm_torchrl.envs.make_gymnasium_env", "my_pkg.make_env"])
@pytest.mark.parametrize(("kind", "text"), [("fail_at", "raised RuntimeError: the wheel"), ("nan_at", "not finite")])
def test_faults_name_environment_and_seed(user_module, maker, kind, text):
    user_module.make_env = lambda id, **kwargs: GymWrapper(gymnasium.make(id, **kwargs))
    cfg = {"_target_": maker, "id": "pwm_tests/Counter-v0", "name": "counter", kind: 3}
    env = make_env(cfg, num_envs=2, seed=20)
    with pytest.raises(EnvironmentFault, match=rf"counter, sub-environment 0 \(seed 20\).*{text}") as caught:
        env.rollout(5)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.name, copy.seed, copy.index) == (str(caught.value), "counter", 20, 0)


def test_diverged_mujoco_is_a_fault_of_its_row(monkeypatch, tmp_path):
    """MuJoCo itself would put the simulation back to its start and go on."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its log
    env = make_env({"_target_": "pwm_torchrl.envs.make_gymnasium_env", "id": "Hopper-v5"}, num_envs=3, seed=20)
    tensordict = env.reset()
    env._env.envs[2].simulator.unwrapped.data.qvel[0] = np.nan
    with pytest.raises(EnvironmentFault, match=r"Hopper-v5, sub-environment 2 \(seed 22\)"):
        env.rand_step(tensordict)


class _Odd(gymnasium.Env):
    """An environment with spaces of the test's choice."""

    def __init__(self, observation=None, action=None):
        self.observation_space = observation or spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = action or spaces.Box(-1, 1, (1,), np.float32)


ODD = [
    ({"action": spaces.Discrete(3)}, "discrete"),
    ({"action": spaces.MultiBinary(3)}, "discrete"),
    ({"action": spaces.Box(-np.inf, np.inf, (1,), np.float32)}, "unbounded"),
    ({"observation": spaces.Box(0, 255, (8, 8, 3), np.uint8)}, "images"),
]


gymnasium.register("pwm_tests/Odd-v0", _Odd)


@pytest.mark.parametrize(("kwargs", "word"), ODD, ids=["discrete", "binary", "unbounded", "images"])
def test_unsupported_spaces(user_module, kwargs, word):
    user_module.make_env = lambda: GymWrapper(_Odd(**kwargs))
    for build in (
        lambda: make_gymnasium_env("pwm_tests/Odd-v0", **kwargs),
        lambda: make_env({"_target_": "my_pkg.make_env"}, num_envs=1, seed=0),
    ):
        with pytest.raises(ConfigurationError, match=word) as caught:
            build()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make_gymnasium_env("Pendlum-v1"), "env.id='Pendlum-v1'.*did you mean Pendulum-v1"),
        (lambda: make_gymnasium_env("CartPole-v1"), "discrete"),
        (lambda: make_gymnasium_env("Pendulum-v1", wobble=1), "wobble"),
        (lambda: make_gymnasium_env("Pendulum-v1", num_envs=0), "env.num_envs=0"),
        (lambda: make_gymnasium_env("Pendulum-v1", action_repeat=1.5), "env.action_repeat=1.5"),
        (lambda: make_gymnasium_env("Pendulum-v1", episode_length=0), "env.episode_length=0"),
        (lambda: make_dm_control_env("cartpol", "swingup"), "env.domain='cartpol'.*did you mean cartpole"),
        (lambda: make_dm_control_env("cartpole", "swing"), "env.task='swing'.*swingup"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ConfigurationError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


GYM = "pwm_torchrl.envs.make_gymnasium_env"


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        ({}, "env._target_ is missing"),
        ({"_target_": "make_env"}, "not a dotted path"),
        ({"_target_": "no_such_pkg.make_env"}, "no module 'no_such_pkg'"),
        ({"_target_": "pwm_torchrl.envs.make_gymnasim_env"}, "did you mean make_gymnasium_env"),
        ({"_target_": "pwm_torchrl.envs.__all__"}, "not a function"),
        ({"_target_": GYM}, "env.id is missing"),
        ({"_target_": "pwm_torchrl.envs.make_dm_control_env", "domain": "walker", "tsk": "run"}, "did you mean task"),
        ({"_target_": "torchrl.envs.PendulumEnv", "action_repeat": 2}, "no argument action_repeat"),
        ({"_target_": "builtins.dict"}, "returned a dict"),
        ({"_target_": "math.sqrt", "x": -1}, "math.sqrt"),
    ],
)
def test_bad_configurations(cfg, text):
    with pytest.raises(ConfigurationError, match=text) as caught:
        make_env(cfg, num_envs=1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("library", "call", "extra"),
    [
        ("gymnasium", lambda: make_gymnasium_env("Pendulum-v1"), "gym"),
        ("dm_control.suite", lambda: make_dm_control_env("cartpole", "swingup"), "dm-control"),
        ("mujoco", lambda: make_gymnasium_env("Hopper-v5"), "mujoco"),
    ],
)
def test_missing_libraries_name_the_extra(monkeypatch, library, call, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=rf"pip install 'pwm-torchrl\[{extra}\]'"):
        call()


def test_report_reads_well():
    text = report_env({"_target_": GYM, "id": "Pendulum-v1", "name": "pendulum", "action_repeat": 2}, 2)
    for part in ("pendulum x 2", "[2, 3] float32", "scaled to [-2, 2]", "100 agent steps = 200 environment steps"):
        assert part in text
    assert "none: episodes only truncate" in text
    assert "exact: simulator variables" in text
    assert "unbounded" not in text
    mine = report_env({"_target_": "torchrl.envs.GymEnv", "env_name": "Hopper-v5"}, 2)
    assert "state to save     none:" in mine
    assert "termination       possible" in mine
