"""The registry's environments step as recorded: one test per task of every ``*.npz`` in --tasks-dir.

A file holds for each of its tasks ``<task>/state`` (of the physics, before the step), ``geom_pos`` and ``site_pos`` (of
the model, where targets are), ``action``, and the ``reward`` (sum over the action repeat) and ``observation`` after it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pwm_torchrl.envs import env_info, make_task_env
from pwm_torchrl.envs.tasks import MT30

pytest.importorskip("dm_control")

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recorded" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--tasks-dir") or Path(__file__).parent
    files = sorted(folder.glob("*.npz"))
    assert files, f"{folder} has no *.npz"
    cases = []
    for file in files:
        with np.load(file) as content:
            tasks = dict.fromkeys(name.rpartition("/")[0] for name in content.files)
        cases += [pytest.param((file, task), id=f"{file.stem}-{task}") for task in tasks]
    metafunc.parametrize("recorded", cases)


@pytest.mark.tasks
def test_reward_and_observation(recorded):
    file, task = recorded
    with np.load(file) as content:
        columns = {name: content[f"{task}/{name}"] for name in (
            "state", "geom_pos", "site_pos", "action", "reward", "observation"
        )}  # fmt: skip
    env = make_task_env(task)
    (sub_env,) = env._env.envs
    rewards, observations = [], []
    for state, geoms, sites, action in zip(
        *(columns[name] for name in ("state", "geom_pos", "site_pos", "action")), strict=True
    ):
        sub_env.reset(seed=0)  # what a task sets up when an episode begins, such as the size of its target
        physics = sub_env.simulator.physics
        physics.model.geom_pos[:], physics.model.site_pos[:] = geoms, sites
        physics.set_state(state)
        physics.forward()
        observation, reward, *_ = sub_env.step(action)
        rewards.append(reward)
        observations.append(observation)
    env.close()
    np.testing.assert_allclose(rewards, columns["reward"], **TOLERANCE)
    np.testing.assert_allclose(observations, columns["observation"], **TOLERANCE)


def test_all_of_mt30_is_recorded():
    """Or agreement would say little."""
    with np.load(Path(__file__).parent / "mt30_transitions.npz") as content:
        assert {name.rpartition("/")[0] for name in content.files} == set(MT30)
        # A reward that is the same in every state would not tell tasks apart.
        varied = [task for task in MT30 if np.ptp(content[f"{task}/reward"]) > 0]
    assert len(varied) > 20
    assert env_info(make_task_env("pendulum-spin")).action_repeat == 2
