"""Facts of environments that are not made yet, against the environments."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("hydra")

import dflex_stand_in

from pwm_torchrl.choices import group_choices
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.envs import env_info, facts, make_env
from pwm_torchrl.envs.dflex import CLASSES
from pwm_torchrl.envs.factory import probe_env
from pwm_torchrl.envs.facts import DFLEX_DIMENSIONS, environment_facts
from pwm_torchrl.envs.rewarped import TASKS
from pwm_torchrl.envs.tasks import TaskInfo, register_task
from pwm_torchrl.envs.tasks import registry as registry
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

STAND_IN = "env.module=dflex_stand_in"
#: Words that make an environment of each file in configs/env, dflex's through its stand-in.
WORDS = {
    "pendulum": [],
    "halfcheetah": [],
    "hopper": [],
    "cartpole_swingup": [],
    "pendulum_torchrl": [],
    "task": ["env.task=walker-walk"],
    "gymnasium": ["env.id=Walker2d-v5"],
    "dm_control": ["env.domain=walker", "env.task=walk"],
    "custom": ["env._target_=training_cases.make_clockwork", "env.episode_length=30"],
    **{name: [STAND_IN] for name in DFLEX_DIMENSIONS},
    **{f"rewarped_{task}": [] for task in TASKS},
    "brax": ["env.id=inverted_pendulum", "+env.backend=positional"],
}


def test_every_environment_is_compared():
    assert set(WORDS) == set(group_choices()["env"])


@pytest.mark.parametrize("name", WORDS)
def test_equal_the_environment(name, monkeypatch):
    if name.startswith("rewarped_") and find_spec("rewarped") is None:
        pytest.skip("needs rewarped: pip install 'pwm-torchrl[rewarped]'")
    if name == "brax" and find_spec("brax") is None:
        pytest.skip("needs Brax: pip install 'pwm-torchrl[brax]'")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    cfg = compose([f"env={name}", *WORDS[name]]).env
    env = make_env(cfg, num_envs=cfg["num_envs"], seed=0)
    known = environment_facts(cfg)
    if name == "task":  # the registry does not say in which units a simulator takes actions
        known = replace(known, action_low=env_info(env).action_low, action_high=env_info(env).action_high)
    assert known == env_info(env)
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

    monkeypatch.setattr(facts, "probe_env", missing)
    cfg = {**compose(["env=cartpole_swingup"]).env, "name": "dflex_ant"}
    with pytest.raises(MissingLibraryError, match="dm_control"):
        environment_facts(cfg)


class TestProbe:
    """An environment is made as little as can be, and closed whatever happens."""

    @pytest.fixture
    def made(self, monkeypatch):
        """Every environment that the maker ``probed.make`` returned, in batches of ``probed.SIZE``."""
        import types

        from torchrl.envs import GymEnv, SerialEnv

        module = types.ModuleType("probed")
        module.SIZE, module.MADE = None, []

        def make():
            env = GymEnv("Pendulum-v1")
            if module.SIZE is not None:
                env = SerialEnv(module.SIZE, lambda: GymEnv("Pendulum-v1"))
                env.start()
            module.MADE.append(env)
            return env

        module.make = make
        monkeypatch.setitem(sys.modules, "probed", module)
        return module

    def test_of_those_that_come_alone_there_is_one(self, made):
        info = probe_env({"_target_": "probed.make"}, {"env.num_envs": 64, "training.eval_episodes": 5})
        assert (info.num_envs, info.observation_dim) == (64, 3)
        assert len(made.MADE) <= 3  # the first tells that it has no batch, and TorchRL looks at one before it batches
        assert all(env.is_closed for env in made.MADE)

    def test_a_batch_is_closed(self, made):
        made.SIZE = 3
        assert probe_env({"_target_": "probed.make"}, {"env.num_envs": 3}).num_envs == 3
        assert [env.is_closed for env in made.MADE] == [True]

    @pytest.mark.parametrize("sizes", [{"env.num_envs": 2}, {"env.num_envs": 3, "training.eval_episodes": 2}])
    def test_a_batch_of_another_size_is_closed_too(self, made, sizes):
        made.SIZE = 3
        key = list(sizes)[-1]
        with pytest.raises(ConfigurationError, match=rf"batch of \[3\] instead of {key}=2"):
            probe_env({"_target_": "probed.make"}, sizes)
        assert [env.is_closed for env in made.MADE] == [True]

    def test_so_is_one_that_make_env_refuses(self, made):
        made.SIZE = 3
        with pytest.raises(ConfigurationError, match=r"batch of \[3\] instead of env\.num_envs=2"):
            make_env({"_target_": "probed.make"}, num_envs=2, seed=0)
        assert [env.is_closed for env in made.MADE] == [True]

    def test_a_registered_task_with_a_batch_of_its_own(self, made, monkeypatch):
        monkeypatch.setattr(registry, "_TASKS", {})
        made.SIZE = 3
        cfg = register_task(TaskInfo("my-pendulum", 3, 1, 50, "probed.make", {})).env_config()
        assert facts.opened_facts(cfg, {"training.eval_episodes": 3}).episode_length == 50
        assert [env.is_closed for env in made.MADE] == [True]
