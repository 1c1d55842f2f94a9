"""Facts of environments that are not made yet, against the environments."""

from __future__ import annotations

import pytest

from pwm_torchrl.envs import dflex_stand_in, env_info, make_env
from pwm_torchrl.envs.facts import DFLEX_DIMENSIONS, environment_facts
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.compose import compose


@pytest.mark.parametrize("name", ["pendulum", "halfcheetah", "cartpole_swingup"])
def test_equal_the_environment(name):
    cfg = compose([f"env={name}"]).env
    env = make_env(cfg, num_envs=cfg["num_envs"], seed=0)
    assert environment_facts(cfg) == env_info(env)
    env.close()


@pytest.mark.parametrize("name", sorted(DFLEX_DIMENSIONS))
def test_dflex_without_dflex(name):
    facts = environment_facts(compose([f"env={name}"]).env)
    stand_in = environment_facts(compose([f"env={name}", "env.module=pwm_torchrl.envs.dflex_stand_in"]).env)
    assert (facts.observation_dim, facts.action_dim) == (stand_in.observation_dim, stand_in.action_dim)
    assert facts == stand_in


def test_unknown_dflex_task():
    cfg = {**compose(["env=dflex_ant"]).env, "name": "dflex_snake"}
    with pytest.raises(ConfigurationError):
        environment_facts(cfg)


def test_the_stand_in_has_every_task():
    assert len(DFLEX_DIMENSIONS) == len([n for n in dflex_stand_in.__all__ if n != "StandInEnv"])
