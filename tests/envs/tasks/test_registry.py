"""The task registry: names, order, dimensions, own tasks; and the environments of all tasks."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import env_info, load_env_state, make_env, make_task_env, save_env_state
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.envs.tasks import MT30, MT80, TaskInfo, info, known_tasks, register_task, task_info, task_set
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

HAS_METAWORLD = importlib.util.find_spec("metaworld") is not None
needs_metaworld = pytest.mark.skipif(not HAS_METAWORLD, reason="Meta-World is not installed")


class TestSets:
    def test_published_order(self):
        assert len(MT30) == 30
        assert len(MT80) == 80
        assert MT80[:30] == MT30
        assert (MT30[0], MT30[7], MT30[12], MT30[29]) == (
            "walker-stand",
            "pendulum-swingup",
            "cup-catch",
            "pendulum-spin",
        )
        assert (MT80[30], MT80[40], MT80[79]) == ("mw-assembly", "mw-disassemble", "mw-hand-insert")
        assert len(set(MT80)) == 80

    def test_widths(self):
        assert (task_set("mt30").observation_dim, task_set("mt30").action_dim) == (24, 6)
        assert (task_set("mt80").observation_dim, task_set("mt80").action_dim) == (39, 6)
        pair = task_set("pendulum-swingup, cup-catch")
        assert (pair.action_dims, pair.observation_dims, pair.index("cup-catch")) == ((1, 2), (3, 8), 1)

    def test_from_yaml(self, tmp_path):
        file = tmp_path / "my_tasks.yaml"
        file.write_text("- cup-spin\n- mw-reach\n")
        tasks = task_set(str(file))
        assert (tasks.name, tasks.names) == ("my_tasks", ("cup-spin", "mw-reach"))
        file.write_text("tasks: [cup-spin]\n")
        with pytest.raises(ConfigurationError, match="must be a list of task names"):
            task_set(str(file))
        file.write_text("- [")
        with pytest.raises(ConfigurationError, match="is not YAML"):
            task_set(str(file))
        with pytest.raises(ConfigurationError, match="cannot be read"):
            task_set(str(tmp_path / "none.yaml"))

    @pytest.mark.parametrize(
        ("tasks", "match"),
        [
            ("walker-wlak", "did you mean walker-walk"),
            ("mt3O", "did you mean mt30"),
            ("cup-spin,cup-spin", "more than once"),
            ("", "is empty"),
            ("quux-zz", "is not known"),
        ],
    )
    def test_bad_input(self, tasks, match):
        with pytest.raises(ConfigurationError, match=match):
            task_set(tasks)

    def test_a_task_of_another_set(self):
        with pytest.raises(ConfigurationError, match="not in the task set"):
            task_set("cup-spin").index("cup-catch")


class Swing:
    """A user's maker of an environment without batch."""

    def __call__(self, length: float = 1.0):
        import gymnasium

        return GymWrapper(gymnasium.make("Pendulum-v1"))


make_swing = Swing()


@pytest.fixture
def own_task(monkeypatch):
    monkeypatch.setattr(info, "_TASKS", dict(known_tasks()))

    def make(**changes):
        values = {"action_repeat": 1, "extra": "", **changes}
        return register_task(TaskInfo("my-swing", 3, 1, 25, f"{__name__}.make_swing", **values))

    return make


class TestOwnTasks:
    def test_has_an_environment(self, own_task):
        own_task()
        env = make_task_env("my-swing", num_envs=2)
        made = env_info(env)
        assert (made.observation_dim, made.action_dim, made.episode_length, made.num_envs) == (3, 1, 25, 2)
        rollout = env.rollout(40, break_when_any_done=True)
        assert rollout.shape == (2, 25)
        assert rollout["next", "truncated"][:, -1].all()
        env.close()

    def test_arguments_go_to_its_maker(self, own_task):
        own_task(arguments={"lenght": 2.0})
        with pytest.raises(ConfigurationError, match="did you mean length"):
            make_task_env("my-swing")

    def test_other_dimensions_than_registered(self, own_task, monkeypatch):
        own_task()
        wrong = TaskInfo("my-swing", 4, 1, 25, f"{__name__}.make_swing", action_repeat=1)
        monkeypatch.setitem(info._TASKS, "my-swing", wrong)
        with pytest.raises(
            ConfigurationError, match="observation_dim=4 in the task registry, and its environment has 3"
        ):
            make_task_env("my-swing")

    def test_a_name_is_taken_once(self, own_task):
        own_task()
        own_task()  # the same again is no other task
        with pytest.raises(ConfigurationError, match="registered already"):
            own_task(score_range=(0.0, 1.0))

    @pytest.mark.parametrize("changes", [{"score_range": (1.0, 1.0)}, {"action_repeat": 0}])
    def test_numbers_that_cannot_be(self, own_task, changes):
        with pytest.raises(ConfigurationError, match="my-swing"):
            own_task(**changes)


def test_scores():
    assert task_info("walker-walk").normalized(250.0) == 0.25
    assert task_info("mw-reach").normalized(0.5) == 0.5
    assert task_info("mw-reach").score == "success"


@pytest.fixture
def absent(monkeypatch):
    """Makes a library look as if it were not installed, without touching what has been loaded of it."""

    def remove(library):
        load = importlib.import_module

        def imported(name, *args):
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {library!r}", name=library)
            return load(name, *args)

        monkeypatch.setattr(importlib, "import_module", imported)

    return remove


def test_facts_need_no_simulator(absent):
    absent("dm_control")
    facts = environment_facts({**task_info("fish-swim").env_config(), "num_envs": 7})
    assert (facts.observation_dim, facts.action_dim, facts.episode_length, facts.num_envs) == (24, 5, 500, 7)


@pytest.mark.parametrize(("task", "library"), [("cup-catch", "dm_control"), ("mw-reach", "metaworld")])
def test_without_its_simulator(absent, task, library):
    absent(library)
    with pytest.raises(MissingLibraryError, match=rf"pwm-torchrl\[{library}\]"):
        make_task_env(task)


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param(t, marks=needs_metaworld) if t.startswith("mw-") else t for t in MT80])
def test_every_environment(task):
    if not task.startswith("mw-"):
        pytest.importorskip("dm_control")
    known = task_info(task)
    env = make_task_env(task, seed=3)
    made = env_info(env)
    assert (made.observation_dim, made.action_dim, made.episode_length, made.action_repeat, made.terminates) == (
        known.observation_dim, known.action_dim, known.episode_length, known.action_repeat, known.terminates
    )  # fmt: skip
    rollout = env.rollout(3)
    assert torch.isfinite(rollout["next", "reward"]).all()
    assert rollout["observation"].shape == (1, 3, known.observation_dim)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["cheetah-jump", "reacher-three-hard", pytest.param("mw-sweep", marks=needs_metaworld)]
)
class TestEpisodes:
    def test_length(self, task):
        env = make_task_env(task)
        rollout = env.rollout(1000)
        assert rollout.shape == (1, task_info(task).episode_length)
        assert rollout["next", "truncated"][0, -1]
        assert not rollout["next", "terminated"].any()

    def test_seeds_and_saved_states(self, task):
        """Also in the middle of an episode, in another environment."""
        env, other = make_task_env(task, seed=5), make_task_env(task, seed=6)
        torch.manual_seed(0)
        actions = torch.rand(30, *env.action_spec.shape) * 2 - 1
        env.reset()
        first = played(env, actions[:10])
        saved = save_env_state(env)
        expected = played(env, actions[10:])
        other.reset()
        load_env_state(other, saved)
        again = played(other, actions[10:])
        assert torch.equal(again["observation"], expected["observation"])
        assert torch.equal(again["reward"], expected["reward"])
        fresh = make_task_env(task, seed=5)
        fresh.reset()
        assert torch.equal(played(fresh, actions[:10])["observation"], first["observation"])
        assert not torch.equal(make_task_env(task, seed=7).reset()["observation"], fresh.reset()["observation"])

    def test_specs(self, task):
        check_env_specs(make_task_env(task, num_envs=2))


def played(env, actions):
    """What follows each action, stacked."""
    return torch.stack([env.step(TensorDict(action=action, batch_size=env.batch_size))["next"] for action in actions])


@needs_metaworld
class TestMetaWorld:
    @pytest.fixture(scope="class")
    @classmethod
    def env(cls):
        return make_task_env("mw-reach", seed=1)

    def test_the_goal_is_seen_and_drawn_anew(self, env):
        goals = torch.stack([env.reset()["observation"][0, -3:] for _ in range(4)])
        assert (goals.abs().sum(1) > 0).all()
        assert len(torch.unique(goals, dim=0)) == 4

    def test_success_is_told_at_every_step(self, env):
        rollout = env.rollout(5)
        assert rollout["next", "success"].dtype == torch.bool
        assert rollout["next", "success"].shape == (1, 5, 1)

    def test_rewards_are_summed_over_two_steps(self, env):
        """After one zero action at the beginning."""
        env.set_seed(11)
        observation = env.reset()["observation"][0]
        (sub_env,) = env._env.envs
        assert sub_env.action_repeat == 2
        twin = make_env(task_info("mw-reach").env_config(), num_envs=1, seed=11)._env.envs[0]
        twin.reset(seed=11)
        action = np.full(4, 0.5, np.float32)
        steps = [twin.simulator.step(action)[1] for _ in range(2)]
        _, reward, *_ = sub_env.step(action)
        assert reward == pytest.approx(sum(steps))
        assert observation.shape == (39,)
