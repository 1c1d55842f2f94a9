"""Command lines of runs on stored episodes."""

from __future__ import annotations

import pytest

pytest.importorskip("hydra")

from stored_cases import write_store

from pwm_torchrl.cli import finalize as module
from pwm_torchrl.cli.command_line import with_preset
from pwm_torchrl.cli.finalize import compose_and_finalize as compose
from pwm_torchrl.cli.finalize import expand_tasks as expand
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.modules import WorldModelSpec, make_world_model, save_world_model

TASKS = ("pendulum-swingup", "cup-catch", "cartpole-swingup")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "a store, with = and [blanks]", TASKS, 2)


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    spec = WorldModelSpec(
        8,
        2,
        16,
        [24],
        [32],
        dynamics={"kind": "flow", "solver": "euler", "substeps": 8, "parameterization": "tangent"},
        num_tasks=3,
        task_dim=4,
        action_dims=(1, 2, 1),
        reward_head="two_hot",
    )
    folder = tmp_path_factory.mktemp("model") / "m"
    labels = {"model": {"name": "flow_v3"}, "size": {"name": "tiny"}}
    save_world_model(folder, make_world_model(spec), spec, task_names=TASKS, observation_dims=(3, 8, 5), labels=labels)
    return folder


class TestPretrain:
    def test_preset(self, store):
        cfg = compose(with_preset("pretrain", [f"data.path={store}", "tasks=cup-catch,pendulum-swingup"]))
        assert cfg.mode == "pretrain"
        assert cfg.tasks == "cup-catch,pendulum-swingup"
        assert (cfg.model.loss.form, cfg.model.loss.rho, cfg.algorithm.model_batch) == ("tdmpc2", 0.99, 256)
        assert (cfg.algorithm.name, cfg.algorithm.slice_length) == ("pwm", 5)
        assert cfg.env["name"] == "cup-catch,pendulum-swingup"
        assert cfg.data.path == str(store)

    @pytest.mark.parametrize(("name", "task_dim"), [("mt30", 64), ("mt80", 96)])
    def test_published_presets(self, monkeypatch, name, task_dim):
        monkeypatch.setattr(module, "_check_stored", lambda config, without_data: None)
        cfg = compose([f"experiment={name}_pretrain", "data.path=somewhere"])
        assert (cfg.tasks, cfg.size.name, cfg.size.task_dim, cfg.model.name) == (name, "48m", task_dim, "flow_v2")
        assert cfg.model.reward_head == "two_hot"
        assert (cfg.algorithm.name, cfg.algorithm.slice_length, cfg.algorithm.model_batch) == ("pwm_paper", 16, 1024)

    def test_no_environment(self, store):
        with pytest.raises(ConfigurationError, match="env has no effect with mode=pretrain"):
            compose(["experiment=pretrain", f"data.path={store}", "env=halfcheetah"])

    @pytest.mark.parametrize(
        ("word", "match"),
        [
            ("tasks=mt3O", "did you mean mt30"),
            ("tasks=cup-cathc", "did you mean cup-catch"),
            ("tasks=walker-walk", "no episodes of walker-walk"),
            ("algorithm.model_updates=0", "model_updates=0 is too small"),
            ("data.validation_fraction=1", "must lie in"),
        ],
    )
    def test_bad_input(self, store, word, match):
        with pytest.raises(ConfigurationError, match=match):
            compose(["experiment=pretrain", f"data.path={store}", word])

    def test_a_key_of_stored_episodes_online(self):
        with pytest.raises(ConfigurationError, match="tasks=mt30 belongs to mode=pretrain"):
            compose(["tasks=mt30"])


class TestExtract:
    @pytest.fixture
    def words(self, store, world_model):
        return [
            "experiment=extract", f"world_model={world_model}", f"data.path={store}", "training.eval_episodes=0"
        ]  # fmt: skip

    def test_the_world_model_says_what_it_is(self, words):
        cfg = compose([*words, "task=cup-catch"])
        dynamics = cfg.model.dynamics
        assert (dynamics.kind, dynamics.solver, dynamics.substeps, dynamics.parameterization) == (
            "flow",
            "euler",
            8,
            "tangent",
        )
        assert (cfg.model.name, cfg.size.name) == ("flow_v3", "tiny")
        assert (cfg.size.latent_dim, cfg.size.units, cfg.size.encoder_units) == (16, [24], [32])
        assert cfg.world_model_sha256
        assert cfg.env["task"] == cfg.env["name"] == "cup-catch"
        assert cfg.model.reward_space == "raw"

    def test_task_all_is_a_run_for_each(self, words):
        assert [run[-1] for run in expand([*words, "task=all"])] == [f"task={name}" for name in TASKS]
        runs = expand([*words, "task=all", "seed=1,2"])
        assert len(runs) == 6
        runs = expand([*words, "task=all", "tasks=cup-catch,cartpole-swingup"])
        assert [run[-1] for run in runs] == ["task=cup-catch", "task=cartpole-swingup"]

    def test_what_task_all_reads_is_no_word_of_its_runs(self, words):
        names = "tasks=cup-catch,cartpole-swingup"
        for run in expand([*words, names, "task=all"]):
            assert names not in run
            assert compose(run).tasks is None
        for run in expand([*words, names, "task=all", "run_dir=runs/${tasks}/${task}"]):  # which another word reads
            assert compose(run).run_dir == f"runs/cup-catch,cartpole-swingup/{compose(run).task}"

    @pytest.mark.parametrize(
        ("more", "remedy"),
        [
            (["task=cup-catch", "tasks=cup-catch,cartpole-swingup"], "with task=cup-catch: choose task=all"),
            (["tasks=cup-catch,cartpole-swingup"], "choose task=all"),
            (["task=cup-catch", "pretraining=mt30_pretrain"], "beside world_model="),
            (["task=cup-catch", "pretraining.seed=3"], "give task=all and no world_model"),
            (["task=all", "pretraining=mt30_pretrain"], "beside world_model="),
            (["task=all", "pretraining.seed=3"], "give task=all and no world_model"),
            (["task=cup-catch", "world_model=null", "pretraining=mt30_pretrain"], "choose task=all"),
            (["task=cup-catch", "world_model=null", "pretraining.seed=3"], "give task=all and no world_model"),
        ],
    )
    def test_what_is_for_task_all_is_refused_where_nothing_reads_it(self, words, more, remedy):
        with pytest.raises(ConfigurationError) as caught:
            compose(expand([*words, *more])[0])
        message = str(caught.value)
        assert more[-1].partition("=")[0] in message
        assert remedy in message
        assert "\n" not in message

    def test_task_all_of_tasks_that_it_does_not_know(self, words):
        with pytest.raises(ConfigurationError, match="was not trained on walker-walk"):
            expand([*words, "task=all", "tasks=walker-walk,cup-catch"])

    def test_task_all_without_a_world_model(self, store):
        with pytest.raises(ConfigurationError, match="set world_model=DIRECTORY"):
            expand(["experiment=extract", f"data.path={store}", "task=all"])

    @pytest.mark.parametrize(
        ("word", "match"),
        [
            ("size=5m", "size is fixed by the pre-trained world_model"),
            ("model=mlp", "model is fixed by"),
            ("model.dynamics.substeps=2", "model.dynamics.substeps is fixed by"),
            ("env=pendulum", "env has no effect"),
            ("task=cup-cacth", "did you mean cup-catch"),
        ],
    )
    def test_bad_input(self, words, word, match):
        with pytest.raises(ConfigurationError, match=match):
            compose([*words, "task=cup-catch", word] if not word.startswith("task=") else [*words, word])

    def test_without_the_simulator(self, words, monkeypatch):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        compose([*words, "task=cup-catch"])  # it evaluates nothing
        with pytest.raises(MissingLibraryError, match=r"pwm-torchrl\[dm-control\]"):
            compose([*words, "task=cup-catch", "training.eval_episodes=2"])

    def test_policy_networks_are_free(self, words):
        cfg = compose([*words, "task=cup-catch", "size.actor_units=[8,8]", "model.reward_space=raw"])
        assert cfg.size.actor_units == [8, 8]
        assert cfg.model.reward_space == "raw"


def test_online_runs_evaluate():
    with pytest.raises(ConfigurationError, match="eval_episodes=0"):
        compose(["training.eval_episodes=0"])
