"""Environments are asked what they are, and what a configuration says of them counts."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.registration import WrapperSpec

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.envs import env_info, make_env
from pwm_torchrl.envs.env_state import env_state_support
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.errors import ConfigurationError

GYMNASIUM = {"_target_": "pwm_torchrl.envs.make_gymnasium_env"}
WALKER = {"_target_": "pwm_torchrl.envs.make_dm_control_env", "domain": "walker", "task": "walk"}
DFLEX = {"_target_": "pwm_torchrl.envs.make_dflex_env", "name": "dflex_ant", "module": "dflex_stand_in"}
TASK = {"_target_": "pwm_torchrl.envs.make_task_env", "task": "walker-walk"}


class Own(PendulumEnv):
    """Somebody's own, under the name of one of gymnasium's; ends by termination."""

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, bool(abs(observation[0]) > 0.9), truncated, info


class Ending(gymnasium.Wrapper):
    """Ends episodes that the simulator would not end."""

    def step(self, action):
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, reward, True, truncated, info


class Parts(gymnasium.Env):
    """Observes three entries."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = spaces.Dict({k: spaces.Box(-9, 9, (n,), np.float32) for k, n in (("a", 1), ("b", 2), ("c", 3))})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {k: np.full(s.shape, i, np.float32) for i, (k, s) in enumerate(self.observation_space.items())}, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


@pytest.fixture(autouse=True)
def registry():
    kept = dict(gymnasium.registry)
    gymnasium.register("lab/Reacher-v0", entry_point=Own, max_episode_steps=20)
    gymnasium.register("lab/Reacher-v3", entry_point=Own, max_episode_steps=30)
    gymnasium.register("lab/Parts-v0", entry_point=Parts, max_episode_steps=20)
    wrapper = WrapperSpec("Ending", f"{__name__}:Ending", {})
    gymnasium.register(
        "lab/Ending-v0",
        entry_point="gymnasium.envs.classic_control:PendulumEnv",
        max_episode_steps=20,
        additional_wrappers=(wrapper,),
    )
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(kept)


def info_of(cfg, **more):
    env = make_env({**cfg, **more}, num_envs=2, seed=0)
    try:
        return env_info(env)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("id", "terminates"),
    [
        ("Pendulum-v1", False), ("HalfCheetah-v5", False), ("Swimmer-v5", False), ("Reacher-v5", False),
        ("Pusher-v5", False), ("HumanoidStandup-v5", False), ("Hopper-v5", True), ("InvertedPendulum-v5", True),
        ("MountainCarContinuous-v0", True), ("lab/Reacher-v0", True), ("lab/Ending-v0", True),
    ],
)  # fmt: skip
def test_whether_a_simulator_terminates_is_asked_of_its_class(id, terminates):
    """Not of its name, which is anybody's to give."""
    assert info_of(GYMNASIUM, id=id).terminates is terminates


def test_of_gymnasiums_own_an_argument_decides():
    assert info_of(GYMNASIUM, id="Hopper-v5", terminate_when_unhealthy=False).terminates is False


@pytest.mark.parametrize("cfg", [{**GYMNASIUM, "id": "Pendulum-v1"}, WALKER, DFLEX, TASK], ids=lambda c: c["_target_"])
@pytest.mark.parametrize("terminates", [True, False])
def test_what_the_configuration_says_of_it_counts(cfg, terminates):
    assert info_of(cfg, terminates=terminates).terminates is terminates
    assert environment_facts({**cfg, "num_envs": 2, "terminates": terminates}).terminates is terminates


def test_terminates_is_true_or_false():
    with pytest.raises(ConfigurationError, match=r"env\.terminates='maybe'"):
        info_of(GYMNASIUM, id="Pendulum-v1", terminates="maybe")


def test_the_keys_of_any_environment_need_no_plus():
    config = compose(["env=pendulum", "env.terminates=true", "env.observation_keys=[a]"])
    assert (config.env["terminates"], config.env["observation_keys"]) == (True, ["a"])


@pytest.mark.parametrize("key", ["seed", "render"])
def test_what_a_run_sets_itself_is_refused(key):
    with pytest.raises(ConfigurationError, match=rf"env\.{key}=1 has no effect"):
        info_of(GYMNASIUM, id="Pendulum-v1", **{key: 1})


class TestIds:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        name = "lab_of_the_test"
        (tmp_path / f"{name}.py").write_text(
            "import gymnasium\n"
            "gymnasium.register('Crane-v0', entry_point='gymnasium.envs.classic_control:PendulumEnv',"
            " max_episode_steps=7)\n"
        )
        (tmp_path / "lab_that_breaks.py").write_text("1 / 0\n")
        monkeypatch.chdir(tmp_path)
        yield name
        sys.modules.pop(name, None)

    def test_a_module_in_front_is_imported(self, module):
        assert info_of(GYMNASIUM, id=f"{module}:Crane-v0").episode_length == 7

    def test_without_a_version_it_is_the_newest(self):
        assert info_of(GYMNASIUM, id="lab/Reacher").episode_length == 30

    @pytest.mark.parametrize(
        ("id", "said"),
        [
            ("lab_nowhere:Crane-v0", "'lab_nowhere'"),
            ("lab_that_breaks:Crane-v0", "ZeroDivisionError"),
            ("lab_of_the_test:Crone-v0", "Crane-v0"),
        ],
    )
    def test_what_cannot_be_found_is_named(self, id, said, module):
        with pytest.raises(ConfigurationError, match=r"env\.id=") as caught:
            info_of(GYMNASIUM, id=id)
        assert said in str(caught.value)


class TestObservationKeys:
    def test_of_gymnasium(self):
        env = make_env({**GYMNASIUM, "id": "lab/Parts-v0", "observation_keys": ["c", "a"]}, num_envs=1, seed=0)
        assert env.reset()["observation"].tolist() == [[2, 2, 2, 0]]

    def test_of_dm_control(self):
        everything = info_of(WALKER).observation_dim
        assert info_of(WALKER, observation_keys=["velocity", "height"]).observation_dim == 10 < everything

    @pytest.mark.parametrize(
        ("cfg", "said"),
        [
            ({**GYMNASIUM, "id": "lab/Parts-v0"}, "a, b, c"),
            ({**GYMNASIUM, "id": "Pendulum-v1"}, "Box"),
            (WALKER, "velocity"),
            (DFLEX, "make_dflex_env"),
        ],
    )
    def test_where_there_are_none(self, cfg, said):
        with pytest.raises(ConfigurationError, match=r"env\.observation_keys=\['d'\]") as caught:
            info_of(cfg, observation_keys=["d"])
        assert said in str(caught.value)


class TestConstructors:
    def test_dm_controls_own_arguments(self):
        assert info_of(WALKER, task_kwargs={"time_limit": 5}).episode_length == 100
        assert info_of(WALKER, environment_kwargs={"flat_observation": True}).observation_dim == 24
        with pytest.raises(ConfigurationError, match="observations"):  # which then is the only entry
            info_of(WALKER, environment_kwargs={"flat_observation": True}, observation_keys=["height"])

    def test_two_limits_are_refused(self):
        for cfg, key in (
            ({**GYMNASIUM, "id": "Pendulum-v1", "max_episode_steps": 5}, "max_episode_steps=5"),
            ({**WALKER, "task_kwargs": {"time_limit": 5}}, "time_limit=5"),
        ):
            with pytest.raises(ConfigurationError, match=key):
                info_of(cfg, episode_length=9)

    def test_an_argument_that_does_not_exist(self):
        with pytest.raises(ConfigurationError, match="speed"):
            info_of(WALKER, task_kwargs={"speed": 5})


def test_a_wrapper_that_may_have_a_state_is_not_said_to_be_saved():
    plain = make_env({**GYMNASIUM, "id": "Pendulum-v1"}, num_envs=1, seed=0)
    wrapped = make_env({**GYMNASIUM, "id": "lab/Ending-v0"}, num_envs=1, seed=0)
    assert env_state_support(plain).startswith("exact")
    assert env_state_support(wrapped).startswith("none")
    assert "Ending" in env_state_support(wrapped)


def test_gymnasiums_environments_do_not_need_dm_control():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('dm_control', 'dm_env')));"
        "from pwm_torchrl.envs import make_gymnasium_env; make_gymnasium_env('Pendulum-v1', num_envs=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
