"""The task registry: names, order, dimensions, own tasks; and the environments of all tasks."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import env_info, load_env_state, make_env, make_task_env, save_env_state
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.envs.tasks import MT30, MT80, TaskInfo, known_tasks, register_task, task_info, task_set
from pwm_torchrl.envs.tasks import registry as info
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

HAS_METAWORLD = importlib.util.find_spec("metaworld") is not None
#: Where Meta-World draws the object only.
FIXED_GOALS = ("mw-hammer", "mw-sweep-into", "mw-bin-picking")
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
        with pytest.raises(ConfigurationError, match="my-swing"):
            own_task(score_range=(0.0, 1.0))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"score_range": (1.0, 1.0)}, "increasing"),
            ({"score_range": (0.0, float("nan"))}, "increasing"),
            ({"action_repeat": 0}, "action_repeat=0 must be an integer"),
            ({"action_repeat": "2"}, "action_repeat='2' must be an integer"),
            ({"score": "sucess"}, "must be return or success"),
        ],
    )
    def test_invalid_values(self, own_task, changes, match):
        with pytest.raises(ConfigurationError, match=f"my-swing.*{match}"):
            own_task(**changes)

    @pytest.mark.parametrize("name", ["", "a,b", "my task", "up/down"])
    def test_invalid_names(self, name):
        """In lists with commas, in paths."""
        with pytest.raises(ConfigurationError, match=f"name={name!r}"):
            register_task(TaskInfo(name, 3, 1, 25, "my_package.make"))

    def test_facts_and_a_maker_suffice(self, own_task):
        """Of a maker that repeats no actions; what it needs is installed."""
        mine = register_task(TaskInfo("my-own", 3, 1, 25, f"{__name__}.make_swing"))
        assert env_info(make_env(mine.env_config(), num_envs=1, seed=0)).action_repeat == mine.action_repeat == 1
        assert task_set("my-own,cup-spin").observation_dims == (3, 8)

    def test_unknown_names_and_their_neighbours(self, own_task):
        own_task()
        with pytest.raises(ConfigurationError, match=r"'my-swnig'.*my-swing"):
            make_task_env("my-swnig")


class TestOwnModules:
    """Tasks that commands and jobs know, as the modules that register them are named in the environment."""

    @pytest.fixture(autouse=True)
    def _in_a_folder(self, monkeypatch, tmp_path):
        monkeypatch.setattr(info, "_TASKS", dict(known_tasks()))
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(tmp_path)
        yield
        sys.modules.pop("my_tasks_for_tests", None)

    def test_are_imported_for_a_name_that_is_not_known(self, monkeypatch, tmp_path):
        (tmp_path / "my_tasks_for_tests.py").write_text(
            "from pwm_torchrl.envs import register_task\n"
            "from pwm_torchrl.envs.tasks import TaskInfo\n"
            "register_task(TaskInfo('my-hop', 11, 3, 100, 'torchrl.envs.GymEnv', {'env_name': 'Hopper-v5'}))\n"
        )
        with pytest.raises(ConfigurationError, match="PWM_TORCHRL_TASKS"):
            task_set("my-hop")
        monkeypatch.setenv("PWM_TORCHRL_TASKS", " my_tasks_for_tests,")
        assert task_set("my-hop,walker-run").action_dims == (3, 6)
        assert env_info(make_task_env("my-hop")).observation_dim == 11

    def test_one_that_is_not_there_is_named(self, monkeypatch):
        monkeypatch.setenv("PWM_TORCHRL_TASKS", "my_tasks_for_tests")
        assert task_set("cup-spin").names == ("cup-spin",)
        with pytest.raises(ConfigurationError, match="PWM_TORCHRL_TASKS=my_tasks_for_tests cannot be imported"):
            task_set("my-hop")


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


@pytest.mark.parametrize(
    ("task", "library", "extra"), [("cup-catch", "dm_control", "dm-control"), ("mw-reach", "metaworld", "metaworld")]
)
def test_without_its_simulator(absent, task, library, extra):
    absent(library)
    assert task_info(task).extra == extra
    with pytest.raises(MissingLibraryError, match=rf"pwm-torchrl\[{extra}\]"):
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
    assert (known.score == "success") is ("success" in rollout["next"].keys())
    if known.score == "success":
        first, second = rollout["observation"][0, 0], env.reset()["observation"][0]
        assert first[-3:].any(), "the goal is hidden"
        assert torch.equal(first[-3:], second[-3:]) is (task in FIXED_GOALS)
        assert not torch.equal(first, second), "nothing is drawn anew"
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
