"""Facts of environments that are not made yet, against the environments."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.envs import dflex_stand_in, env_info, facts, make_env
from pwm_torchrl.envs.dflex_maker import CLASSES
from pwm_torchrl.envs.facts import DFLEX_DIMENSIONS, environment_facts
from pwm_torchrl.envs.tasks import TaskInfo, register_task
from pwm_torchrl.envs.tasks import info as registry
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.groups import group_choices

STAND_IN = "env.module=pwm_torchrl.envs.dflex_stand_in"
#: Words that make an environment of each file in configs/env, dflex's through its stand-in.
WORDS = {
    "pendulum": [],
    "halfcheetah": [],
    "hopper": [],
    "cartpole_swingup": [],
    "gymnasium": ["env.id=Walker2d-v5"],
    "dm_control": ["env.domain=walker", "env.task=walk"],
    "custom": ["env._target_=training_cases.make_clockwork", "env.episode_length=30"],
    **{name: [STAND_IN] for name in DFLEX_DIMENSIONS},
}


def test_every_environment_is_compared():
    assert set(WORDS) == set(group_choices()["env"])


@pytest.mark.parametrize("name", WORDS)
def test_equal_the_environment(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    cfg = compose([f"env={name}", *WORDS[name]]).env
    env = make_env(cfg, num_envs=cfg["num_envs"], seed=0)
    assert environment_facts(cfg) == env_info(env)
    assert env_info(env).num_envs == cfg["num_envs"] > 1
    env.close()


class TestDflexWithoutDflex:
    @pytest.fixture(autouse=True)
    def _not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "dflex", None)
        monkeypatch.setitem(sys.modules, "dflex.envs", None)

    @pytest.mark.parametrize(
        "changes",
        [[], ["env.episode_length=77", "env.num_envs=5"], ["+env.early_termination=false"]],
        ids=lambda changes: "+".join(changes) or "defaults",
    )
    @pytest.mark.parametrize("name", sorted(DFLEX_DIMENSIONS))
    def test_is_known_from_a_table(self, name, changes):
        known = environment_facts(compose([f"env={name}", *changes]).env)
        assert known == environment_facts(compose([f"env={name}", STAND_IN, *changes]).env)

    def test_the_table_has_the_simulators_numbers(self):
        assert set(DFLEX_DIMENSIONS) == {f"dflex_{task}" for task in CLASSES}
        for task, simulator in CLASSES.items():
            made = getattr(dflex_stand_in, simulator)
            assert DFLEX_DIMENSIONS[f"dflex_{task}"] == (made.num_obs, made.num_actions)

    def test_short_names_are_known_too(self):
        cfg = {**compose(["env=dflex_ant"]).env, "name": "ant"}
        assert environment_facts(cfg).observation_dim == 37

    def test_a_task_that_does_not_exist(self):
        with pytest.raises(ConfigurationError, match="dflex_snake"):
            environment_facts({**compose(["env=dflex_ant"]).env, "name": "dflex_snake"})


@pytest.mark.parametrize("terminates", [False, True])
def test_a_task_of_the_users_own_is_what_it_is_registered_as(terminates, monkeypatch):
    """Also where its maker's environment does not say whether it terminates."""
    monkeypatch.setattr(registry, "_TASKS", {})
    maker, arguments = "torchrl.envs.GymEnv", {"env_name": "Pendulum-v1"}
    mine = TaskInfo("my-pendulum", 3, 1, 50, maker, arguments, action_repeat=1, terminates=terminates)
    cfg = {**register_task(mine).env_config(), "num_envs": 2}
    env = make_env(cfg, num_envs=2, seed=0)
    made = env_info(env)
    assert (made.action_low, made.action_high) == ((-2.0,), (2.0,))
    assert environment_facts(cfg) == replace(made, action_low=(), action_high=()), "which no registration says"
    assert made.terminates is terminates
    env.close()


def test_another_library_that_is_missing_is_an_error(monkeypatch):
    """Whatever its environment is called."""

    def missing(*args, **kwargs):
        raise MissingLibraryError("dm_control is not installed")

    monkeypatch.setattr(facts, "make_env", missing)
    cfg = {**compose(["env=cartpole_swingup"]).env, "name": "dflex_ant"}
    with pytest.raises(MissingLibraryError, match="dm_control"):
        environment_facts(cfg)
