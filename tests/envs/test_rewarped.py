"""rewarped's simulations against rewarped's own environments, finite differences, and what a run asks of them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from torchrl.envs.utils import check_env_specs
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.config import AlgorithmConfig
from pwm_torchrl.envs import env_info, load_env_state, make_rewarped_env, save_env_state
from pwm_torchrl.envs.dflex import CLASSES, REWARPED
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.envs.rewarped import TASKS, _quiet
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.trace import UpdateTracer

from .conftest import random_actions

if find_spec("rewarped") is None:
    pytest.skip("needs rewarped: pip install 'pwm-torchrl[rewarped]'", allow_module_level=True)

DIMENSIONS = {"ant": (37, 8), "cartpole": (5, 1), "hopper": (11, 3), "humanoid": (76, 21)}
FRAMES = 4


def starts(task, count=4, seed=0):
    simulator = make_rewarped_env(task, count).simulator
    return simulator, simulator.reset(count, torch.Generator().manual_seed(seed))


def actions_of(simulator, count=4, frames=FRAMES):
    return torch.rand(frames, count, simulator.action_dim, generator=torch.Generator().manual_seed(1)) * 2 - 1


def rolled_out(simulator, state, actions):
    """States ``[T, B, S]``, rewards ``[T, B]`` and terminations ``[T, B]``."""
    steps = []
    for action in actions:
        state, reward, terminated = simulator.step(state, action)
        steps.append((state, reward[:, 0], terminated[:, 0]))
    return tuple(torch.stack(each) for each in zip(*steps, strict=True))


def return_gradient(simulator, state, actions):
    actions = actions.clone().requires_grad_()
    _, rewards, _ = rolled_out(simulator, state, actions)
    return torch.autograd.grad(rewards.sum(), actions)[0]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_specs(task):
    env = make_rewarped_env(f"rewarped_{task}", num_envs=3)
    check_env_specs(env)
    info = env_info(env)
    assert (info.observation_dim, info.action_dim) == DIMENSIONS[task]
    assert (info.name, info.episode_length, info.num_envs) == (f"rewarped_{task}", 1000, 3)
    assert info.terminates is (task != "cartpole")
    assert info.simulator is env.simulator


class TestPhysics:
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Warp, in rewarped's own step
    @pytest.mark.parametrize("task", ["ant", "cartpole", "hopper"])
    def test_equals_rewarped(self, task):
        """Observations and rewards of rewarped's environment, with joints of one axis."""
        simulator, _ = starts(task)
        with _quiet():
            theirs = simulator._class(
                num_envs=4, no_grad=False, no_env_offset=True, use_graph_capture=False, device="cpu"
            )
            theirs.reset(clear_grad=True)
        joints = [getattr(theirs.state, key).detach().clone().view(4, -1) for key in ("joint_q", "joint_qd")]
        start = torch.cat([*joints, torch.zeros(4, simulator.action_dim)], -1)
        actions = actions_of(simulator)
        mine, my_rewards, _ = rolled_out(simulator, start, actions)
        for t in range(FRAMES):
            observation, reward, done, _ = theirs.step(actions[t])
            assert not done.any()
            if task == "hopper":  # without the position that dflex leaves out; its reward reads shifted entries
                observation = observation[:, 1:]
            else:
                torch.testing.assert_close(my_rewards[t], reward.detach())
            torch.testing.assert_close(simulator.observe(mine[t]), observation.detach())

    @pytest.mark.parametrize("task", ["hopper", "humanoid"])
    def test_free_fall(self, task):
        """Whatever the joints do, the centre of mass falls at 9.81 m/s², of which rewarped's own errs by 4 to 30."""
        simulator, start = starts(task, 2)
        world = simulator._world(2, start.device)
        world.model.ground = False
        world.integrator.update_mass_matrix_every = 1
        mass = torch.from_numpy(world.model.body_mass.numpy()).view(2, -1, 1)
        offset = torch.from_numpy(world.model.body_com.numpy()).view(2, -1, 3)
        centres = []
        for action in actions_of(simulator, 2, 5):
            joints = start[:, : -simulator.action_dim].split((simulator._positions, simulator._velocities), -1)
            _, first, _, _ = world.simulate(*joints, torch.zeros(2, world.model.joint_act.size // 2), False)
            pose = torch.from_numpy(first.body_q.numpy()).view(2, -1, 7)
            position, axis, real = pose.split((3, 3, 1), -1)
            turned = offset + 2 * torch.linalg.cross(axis, torch.linalg.cross(axis, offset) + real * offset)
            centres.append(((position + turned) * mass).sum(1) / mass.sum(1))
            start, _, _ = simulator.step(start, action)
        error = torch.stack(centres).diff(dim=0).diff(dim=0) * 60**2 + torch.tensor([0.0, 9.81, 0.0])
        assert error.square().mean().sqrt() < 1.0

    def test_random_actions_never_overflow(self):
        """rewarped's own Hopper does within 20 frames."""
        simulator, state = starts("hopper", 32)
        fallen = torch.zeros(32, 1, dtype=torch.bool)
        for action in actions_of(simulator, 32, 60):
            state, reward, terminated = simulator.step(state, action)
            fallen |= terminated
            assert reward.isfinite().all()
            assert state.abs().max() < 40
        assert 4 < fallen.sum() <= 32

    def test_hopper_has_dflexs_reward(self):
        simulator, start = starts("hopper")
        actions = actions_of(simulator)
        states, rewards, terminated = rolled_out(simulator, start, actions)
        height, angle, velocity = states[..., 1], states[..., 2], states[..., 6]
        above = (height + 0.3).clamp(-1, 0.3)
        upright = torch.where(above < 0, -200 * above**2, above) + 1 - (angle / (torch.pi / 6)) ** 2
        torch.testing.assert_close(rewards, velocity + upright - 0.1 * actions.square().sum(-1))
        assert torch.equal(terminated, height < -0.45)

    @pytest.mark.parametrize("place", ["ground", "air"])
    @pytest.mark.parametrize("task", sorted(TASKS))
    def test_gradients_equal_finite_differences(self, task, place):
        """Of the last frame's actions where contacts have kinks, and in the air of all, between joints' limits."""
        simulator, start = starts(task)
        if place == "air" and task != "cartpole":
            start[:, 1] += 1
        actions = 0.5 * actions_of(simulator)
        gradient = return_gradient(simulator, start, actions)
        assert (gradient.abs() > 0).all()
        # Over several frames, rounding needs more tolerance, and limits a smaller step.
        frames, h, atol = ([FRAMES - 1], 1e-2, 1e-3) if place == "ground" else (range(FRAMES), 3e-3, 2e-2)
        for t in frames:
            up, down = actions.clone(), actions.clone()
            up[t, :, 0] += h
            down[t, :, 0] -= h
            rewards = [rolled_out(simulator, start, each)[1].sum(0) for each in (up, down)]
            torch.testing.assert_close(gradient[t, :, 0], (rewards[0] - rewards[1]) / (2 * h), rtol=0.01, atol=atol)

    @pytest.mark.parametrize("task", ["hopper", "ant"])
    def test_steps_are_equal_with_and_without_gradients(self, task):
        simulator, start = starts(task)
        actions = actions_of(simulator)
        plain = rolled_out(simulator, start, actions)
        recorded = rolled_out(simulator, start, actions.clone().requires_grad_())
        assert not plain[0].requires_grad
        assert recorded[0].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))

    def test_rows_do_not_depend_on_each_other(self):
        """A batch can be split."""
        simulator, start = starts("ant", 4)
        actions = actions_of(simulator)
        whole, gradient = rolled_out(simulator, start, actions), return_gradient(simulator, start, actions)
        for rows in (slice(0, 1), slice(1, 4)):
            part = rolled_out(simulator, start[rows], actions[:, rows])
            assert all(torch.equal(a, b[:, rows]) for a, b in zip(part, whole, strict=True))
            assert torch.equal(return_gradient(simulator, start[rows], actions[:, rows]), gradient[:, rows])

    def test_a_gradient_can_be_taken_again(self):
        simulator, start = starts("cartpole")
        actions = actions_of(simulator).requires_grad_()
        total = rolled_out(simulator, start, actions)[1].sum()
        first, again = (torch.autograd.grad(total, actions, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)

    def test_states_have_gradients_too(self):
        simulator, start = starts("cartpole")
        start = start.requires_grad_()
        following, _, _ = simulator.step(start, torch.zeros(4, 1))
        (gradient,) = torch.autograd.grad(following[:, :2].sum(), start)
        assert (gradient[:, :4].abs() > 0).all()
        assert (gradient[:, 4] == 0).all()  # the last action moves nothing

    def test_copies_step_alike(self):
        simulator, start = starts("cartpole")
        action = actions_of(simulator)[0]
        for other in (copy.deepcopy(simulator), pickle.loads(pickle.dumps(simulator))):
            assert torch.equal(other.step(start, action)[0], simulator.step(start, action)[0])


class TestEpisodes:
    def test_the_last_observation_is_returned_and_then_a_new_episode(self):
        env = make_rewarped_env("hopper", 3, episode_length=5)
        data = env.reset()
        env._state[1, 1] = -2.0  # below the height of a fall
        ends = []
        for action in random_actions(env, 5):
            data["action"] = action
            step, data = env.step_and_maybe_reset(data)
            ends.append((step["next", "terminated"][:, 0].tolist(), step["next", "truncated"][:, 0].tolist()))
            if len(ends) == 1:
                assert step["next", "observation"][1, 0] < -0.45
                assert data["observation"][1, 0] > -0.45
        assert ends[0] == ([False, True, False], [False] * 3)
        assert ends[1:4] == [([False] * 3, [False] * 3)] * 3
        assert ends[4] == ([False] * 3, [True, False, True])

    def test_without_early_termination(self):
        env = make_rewarped_env("hopper", 3, early_termination=False)
        assert env_info(env).terminates is False
        data = env.reset()
        env._state[1, 1] = -2.0
        assert not env.rand_step(data)["next", "terminated"].any()

    def test_initial_states_follow_the_seed_and_nothing_else(self):
        first, second = (make_rewarped_env("ant", 3, seed=seed) for seed in (5, 6))
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        begun = first.reset()["observation"]
        assert torch.equal(torch.rand(1), expected)
        assert torch.equal(begun, make_rewarped_env("ant", 3, seed=5).reset()["observation"])
        assert not torch.equal(begun, second.reset()["observation"])
        assert len(begun.unique(dim=0)) == 3
        assert len(make_rewarped_env("ant", 3, stochastic_init=False).reset()["observation"].unique(dim=0)) == 1

    def test_a_saved_state_continues_exactly(self):
        env, other = (make_rewarped_env("ant", 3, seed=seed, episode_length=6) for seed in (0, 9))
        env.rollout(3, break_when_any_done=False)
        load_env_state(other, save_env_state(env))
        actions = random_actions(env, 6)
        ends = []
        for each in (env, other):
            data = each.reset(each.fake_tensordict().set("_reset", torch.zeros(3, 1, dtype=torch.bool)))
            steps = []
            for action in actions:
                step, data = each.step_and_maybe_reset(data.set("action", action))
                steps.append(step["next", "observation"])
            ends.append(torch.stack(steps))
        assert torch.equal(*ends)


def test_making_and_stepping_prints_nothing():
    code = "from pwm_torchrl.envs import make_rewarped_env as make; make('hopper', 2).rollout(2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


class TestErrors:
    def test_an_unknown_name(self):
        with pytest.raises(ConfigurationError, match=r"env.name='hoper'.*did you mean hopper"):
            make_rewarped_env("hoper")

    def test_what_rewarped_raises_while_it_builds(self, monkeypatch, capfd):
        from rewarped.envs.dflex.cartpole import Cartpole

        def broken(self, builder):
            print("building")
            raise RuntimeError("no such file")

        monkeypatch.setattr(Cartpole, "create_articulation", broken)
        with pytest.raises(ConfigurationError, match=r"rewarped_cartpole.*RuntimeError: no such file"):
            make_rewarped_env("cartpole")
        assert capfd.readouterr().out == ""
        print("heard")
        assert capfd.readouterr().out == "heard\n"

    def test_gym_is_what_it_was(self, monkeypatch):
        """rewarped's modules import it under this name."""
        monkeypatch.delitem(sys.modules, "gym", raising=False)
        make_rewarped_env("cartpole")
        assert "gym" not in sys.modules
        theirs = types.ModuleType("gym")
        monkeypatch.setitem(sys.modules, "gym", theirs)
        make_rewarped_env("cartpole")
        assert sys.modules["gym"] is theirs


def test_dflex_names_the_tasks_that_are_here_too():
    assert set(REWARPED) == set(CLASSES) & set(TASKS)


class TestTraining:
    """``algorithm=shac``, with what a plan predicts of it."""

    ENV: ClassVar = {
        "_target_": "pwm_torchrl.envs.make_rewarped_env",
        "name": "rewarped_cartpole",
        "num_envs": 4,
        "episode_length": 12,
    }

    def config(self, **env):
        cfg = config({"training.epochs": 3, "training.eval_episodes": 1}, {**self.ENV, **env})
        kept = ("horizon", "collect_steps", "critic_passes", "critic_minibatches")
        cfg.algorithm = AlgorithmConfig(name="shac", detach=False, **{key: getattr(cfg.algorithm, key) for key in kept})
        return cfg

    def test_stopped_and_resumed_equals_straight(self, tmp_path, monkeypatch):
        _, whole = run_with(monkeypatch, self.config(), tmp_path / "straight")
        run_with(monkeypatch, self.config(), tmp_path / "parts", after_epoch=stop_after(2))
        torch.manual_seed(1234)
        last, parts = run_with(monkeypatch, self.config(), tmp_path / "parts", resume=True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "straight")
        assert (last["status"], last["resume_exact"]) == ("finished", True)

    def test_the_plan_counts_what_warp_keeps_for_the_gradient(self):
        peaks = {}
        for envs in (16, 64):
            facts = make_rewarped_env("cartpole", 1).pwm_info
            tracer = UpdateTracer(self.config(num_envs=envs), facts)
            peaks[envs] = tracer.transient("actor").peak
        tapes = 48 * tracer.updates["actor"].steps * facts.simulator._held
        assert tapes < peaks[64] - peaks[16] < 2 * tapes

    def test_the_preset_of_dflex_runs_here(self):
        pytest.importorskip("hydra")
        from pwm_torchrl.cli.compose import compose

        cfg = compose(["experiment=dflex_ant_48m_flow_v2", "env=rewarped_ant"])
        assert cfg.env["num_envs"] == 128
        facts = environment_facts(cfg.env)
        assert (facts.name, facts.observation_dim, facts.action_dim) == ("rewarped_ant", 37, 8)
