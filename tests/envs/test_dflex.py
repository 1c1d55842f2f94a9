"""DFlexEnv against the stand-in, whose traps are dflex's."""

from __future__ import annotations

import subprocess
import sys

import dflex_stand_in as stand_in
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import DFlexEnv, EnvironmentFault, env_info, make_dflex_env, render_frame
from pwm_torchrl.envs.differentiable import RandomStream
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

from .conftest import play, random_actions

MODULE = "dflex_stand_in"
DIMENSIONS = {"hopper": (11, 3), "ant": (37, 8), "anymal": (49, 12), "humanoid": (76, 21), "snu_humanoid": (53, 152)}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_specs(name):
    env = make_dflex_env(name, num_envs=3, module=MODULE, MM_caching_frequency=16)
    check_env_specs(env)
    info = env_info(env)
    assert (info.observation_dim, info.action_dim) == DIMENSIONS[name]
    assert (info.name, info.episode_length, info.terminates) == (f"dflex_{name}", 1000, True)


def test_steps_match_the_simulator_by_hand():
    """True last observations, rewards of the state before, flags that stay what they were, all without graph."""
    env = make_dflex_env("ant", num_envs=4, module=MODULE, episode_length=9, stochastic_init=False)
    simulator = stand_in.AntEnv(num_envs=4, episode_length=9, stochastic_init=False)
    actions = random_actions(env, 40)
    tensordict = env.reset()
    assert not tensordict["observation"].requires_grad
    steps = []
    for action in actions:
        tensordict["action"] = action
        step, tensordict = env.step_and_maybe_reset(tensordict)
        steps.append((step, tensordict["observation"]))
    simulator.reset()
    ends = 0
    for action, (step, following) in zip(actions, steps, strict=True):
        before = simulator.state.detach().clone()
        after, _, done, extras = simulator.step(action)
        torch.testing.assert_close(step["next", "observation"], extras["obs_before_reset"].detach())
        torch.testing.assert_close(following, after.detach())
        reward = 1.0 + before[:, 0] - 0.1 * action.square().mean(-1)
        torch.testing.assert_close(step["next", "reward"][:, 0], reward)
        assert torch.equal(step["next", "done"][:, 0], done)
        assert torch.equal(step["next", "terminated"][:, 0], extras["termination"])
        assert torch.equal(step["next", "truncated"][:, 0], extras["truncation"])
        assert not step["next", "observation"].requires_grad
        assert not step["next", "reward"].requires_grad
        ends += int(done.sum())
    assert ends >= 16


def test_reset_inside_the_step_is_not_repeated():
    env = make_dflex_env("hopper", num_envs=3, module=MODULE, early_termination=False, episode_length=5)
    calls = []
    reset = env.simulator.reset
    env.simulator.reset = lambda **kwargs: (calls.append(kwargs), reset(**kwargs))[1]
    play(env, env.reset(), random_actions(env, 23))
    assert len(calls) == 1


def test_partial_reset_in_the_middle_touches_only_its_rows():
    env = make_dflex_env("hopper", num_envs=3, module=MODULE)
    _, present = play(env, env.reset(), random_actions(env, 4))
    before = present["observation"].clone()
    present["_reset"] = torch.tensor([[False], [True], [False]])
    after = env.reset(present)["observation"]
    assert torch.equal((after == before).all(-1), torch.tensor([True, False, True]))
    assert env.simulator.progress_buf.tolist() == [4, 0, 4]


def test_full_reset_of_running_rows():
    env = make_dflex_env("hopper", num_envs=3, module=MODULE)
    play(env, env.reset(), random_actions(env, 4))
    env.reset()
    assert env.simulator.progress_buf.tolist() == [0, 0, 0]


def test_one_bad_row_is_a_fault():
    env = make_dflex_env("hopper", num_envs=3, module=MODULE, seed=6)
    tensordict = env.reset()
    env.simulator.state[1, 2] = torch.nan
    with pytest.raises(EnvironmentFault, match=r"dflex_hopper, sub-environment 1 \(seed 6\): observation is not"):
        env.rand_step(tensordict)


def test_an_exception_is_a_fault():
    env = make_dflex_env("hopper", num_envs=3, module=MODULE, seed=6)
    tensordict = env.reset()
    env.simulator.state[:] = torch.nan
    with pytest.raises(EnvironmentFault, match="dflex_hopper, seed 6: step raised RuntimeError: simulation is not"):
        env.rand_step(tensordict)


def test_global_random_state_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    env = make_dflex_env("hopper", num_envs=3, module=MODULE)
    env.reset()
    assert torch.equal(torch.rand(1), expected)


def test_a_simulator_on_the_cpu_seeds_no_gpu(monkeypatch):
    """torch.manual_seed seeds every GPU's generator, with which a run may train."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it seeds every GPU"))
    stream = RandomStream(torch.device("cpu"))
    stream.seed(3)
    with stream.active():
        drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_arguments():
    assert make_dflex_env("hopper", 2, module=MODULE, termination_height=-0.1).simulator.termination_height == -0.1
    assert env_info(make_dflex_env("hopper", 2, module=MODULE, early_termination=False)).terminates is False
    with pytest.raises(ConfigurationError, match="did you mean termination_height"):
        make_dflex_env("hopper", 2, module=MODULE, termination_heigth=-0.1)
    with pytest.raises(ConfigurationError, match=r"env.name='hoper'.*did you mean hopper"):
        make_dflex_env("hoper", 2, module=MODULE)
    with pytest.raises(ConfigurationError, match="dflex_"):
        render_frame(make_dflex_env("hopper", 1, module=MODULE))


def test_missing_extras_say_which_dflex_is_needed():
    class Old(stand_in.HopperEnv):
        def step(self, actions, play=False):
            observation, reward, done, extras = super().step(actions)
            extras.pop("obs_before_reset")
            return observation, reward, done, extras

    env = DFlexEnv(Old(num_envs=2), name="old")
    with pytest.raises(ConfigurationError, match=r"extras\['obs_before_reset'\]"):
        env.rollout(1)


def test_missing_dflex_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dflex", None)
    with pytest.raises(
        MissingLibraryError,
        match=r"env.name=ant needs dflex, which is not installed.*research.*pip install 'git\+https.*env=rewarped_ant",
    ):
        make_dflex_env("ant", 2)
    with pytest.raises(MissingLibraryError, match=r"env.name=snu_humanoid needs dflex") as caught:
        make_dflex_env("snu_humanoid", 2)
    assert "rewarped" not in str(caught.value)


@pytest.mark.parametrize("fails", [False, True])
def test_code_from_before_numpy_2(fails, tmp_path, monkeypatch):
    """dflex reads np.Inf when its modules load and its environments are made, which gives no other code the name."""
    monkeypatch.delattr(np, "Inf", raising=False)
    (tmp_path / "old_dflex.py").write_text(
        "import numpy as np\nimport dflex_stand_in\nLIMIT = np.Inf\n"
        "class HopperEnv(dflex_stand_in.HopperEnv):\n"
        "    def __init__(self, num_envs, broken=False):\n"
        "        super().__init__(num_envs)\n"
        "        self.limits = np.ones(3) * -np.Inf, LIMIT\n"
        "        assert not broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_dflex", raising=False)
    if fails:
        with pytest.raises(ConfigurationError, match="AssertionError"):
            make_dflex_env("hopper", 2, module="old_dflex", broken=True)
    else:
        low, high = make_dflex_env("hopper", 2, module="old_dflex").simulator.limits
        assert (low.tolist(), high) == ([-np.inf] * 3, np.inf)
    assert "Inf" not in vars(np)


def test_importing_the_package_loads_no_simulator():
    heavy = ("dflex", "dm_control", "torchrl", "gymnasium", "hydra")
    code = f"import sys, pwm_torchrl; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
