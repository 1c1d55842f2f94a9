"""A policy for every task, with the pre-training before it, from one command."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("hydra")

from stored_cases import write_store

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.finalize import compose_and_finalize as compose
from pwm_torchrl.cli.run_requests import lacks_world_model
from pwm_torchrl.cli.submit import compose_stages
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import read_world_model, world_model_facts
from pwm_torchrl.run.directory import load_config, prepare_run_dir
from pwm_torchrl.run.stored_episodes import pin_world_model
from pwm_torchrl.run.validation import write_model_description
from pwm_torchrl.training import train

main = partial(run_command, "submit")

TASKS = ("pendulum-swingup", "cup-catch")
#: Both stages as small as can be.
SMALL = (
    *("model=mlp", "size=tiny", "size.latent_dim=16", "size.units=[16]", "size.encoder_units=[16]", "device=cpu"),
    *(f"pretraining.{word}" for word in ("algorithm.slice_steps=4", "algorithm.model_batch=8", "training.epochs=2")),
    *("pretraining.algorithm.model_updates=2", "pretraining.training.eval_every=1"),
    *("data.validation_fraction=0.2", "data.validation_slices=4"),
    *(
        "size.actor_units=[8]",
        "size.critic_units=[8]",
        "algorithm.horizon=4",
        "algorithm.slice_steps=4",
        "algorithm.actor_batch=4",
    ),
    *("training.epochs=2", "training.eval_every=0", "training.eval_episodes=0", "training.video=false"),
)


@pytest.fixture
def words(tmp_path):
    store = write_store(tmp_path / "store", TASKS)
    return ["experiment=extract", "task=all", f"data.path={store}", f"runs_dir={tmp_path / 'runs'}", *SMALL]


def test_words_go_where_they_belong(words):
    with compose_stages([*words, "seed=1,2"]) as chain:
        first, policies = chain.pretraining.config, [each.config for each in chain.policies]
        assert (first.mode, first.model.name, first.size.units, first.seed) == ("pretrain", "mlp", [16], 0)
        assert (first.algorithm.model_updates, first.training.epochs, first.algorithm.model_batch) == (2, 2, 8)
        assert first.model.loss.form == "tdmpc2"
        assert [(each.task, each.seed) for each in policies] == [(task, seed) for task in TASKS for seed in (1, 2)]
        for each in policies:
            assert (each.mode, each.size.actor_units, each.algorithm.actor_batch) == ("extract", [8], 4)
            assert (each.size.units, each.size.latent_dim, each.model.name) == ([16], 16, "mlp")  # the model to come
            assert each.world_model_sha256 is None
        assert not world_model_facts(chain.folder).trained
    assert not chain.folder.exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], True), (["world_model=somewhere"], False), (["pretraining=null"], False), (["pretraining.seed=3"], True)],
)
def test_when_a_pretraining_comes_first(words, more, expected):
    assert lacks_world_model([*words, *more]) is expected
    assert not lacks_world_model(["task=all"])
    assert not lacks_world_model([word for word in words if word != "task=all"])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("model=mlp,flow_v2", "model=mlp,flow_v2 would need several pre-trainings"),
        ("pretraining.seed=1,2", "seed=1,2 would need several pre-trainings"),
        ("pretraining.algorithm.horizn=3", "in the pre-training: .*nearest: algorithm.horizon"),
        ("pretraining=pretrian", "in the pre-training: .*nearest: pretrain"),
        ("tasks=cup-catch,walker-walk", "in the pre-training: .*no episodes of walker-walk"),
        ("algorithm.actor_batch=0", "actor_batch=0 is too small"),
    ],
)
def test_bad_input_before_anything_is_written(words, more, sentence, tmp_path):
    with pytest.raises(ConfigurationError, match=sentence), compose_stages([*words, more]):
        pass
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_both_stages(words, tmp_path, capsys):
    assert main([*words, "cluster=local", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no world_model is given: experiment=pretrain trains one first, then 2 policies in it\n")
    assert "mode: pretrain" in out
    assert "# configuration of the first of 2 runs" in out
    assert not (tmp_path / "runs").exists()


def test_both_stages_here(words, tmp_path, capsys):
    assert main([*words, "cluster=debug"]) == 0
    (model,) = (tmp_path / "runs").glob("stored_*")
    policies = [path for path in (tmp_path / "runs").iterdir() if path != model and not path.name.startswith(".")]
    assert len(policies) == 2
    trained = world_model_facts(model)
    for each in policies:
        cfg = load_config(each)
        assert cfg.world_model == str(model)
        assert cfg.world_model_sha256 == trained.sha256
        assert json.loads((each / "summary.json").read_text())["status"] == "finished"


def test_no_policy_after_a_pretraining_that_failed(words, tmp_path, capsys):
    """It diverges at once: a learning rate without bounds."""
    assert main([*words, "cluster=debug", "pretraining.algorithm.model_lr=1e30"]) == 1
    (only,) = [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    err = capsys.readouterr().err
    assert "no policy was started; after the pre-training has finished: python launch/submit.py experiment=" in err
    assert f"world_model={only} task=all" in err


class TestAnnounced:
    @pytest.fixture
    def pretraining(self, words, tmp_path):
        with compose_stages(words) as chain:
            run_dir = prepare_run_dir(chain.pretraining.config).path
            write_model_description(chain.pretraining.config, run_dir)
        return run_dir

    @pytest.fixture
    def policy(self, words, pretraining):
        of_others = ("pretraining.", "model=", "size=", "size.", "task=", "data.validation")
        own = [word for word in words if not word.startswith(of_others)]
        cfg = compose([*own, f"world_model={pretraining}", "task=cup-catch"])
        return cfg, prepare_run_dir(cfg).path

    def test_is_what_training_makes(self, pretraining):
        said = world_model_facts(pretraining)
        with pytest.raises(ConfigurationError, match="has no weights yet"):
            read_world_model(pretraining)
        train(load_config(pretraining), pretraining)
        made = world_model_facts(pretraining)
        assert made.trained
        assert (said.spec, said.task_names, said.observation_dims) == (
            made.spec,
            made.task_names,
            made.observation_dims,
        )
        write_model_description(load_config(pretraining), pretraining)  # a second submission of the directory
        assert world_model_facts(pretraining) == made

    def test_without_validation_too(self, words):
        with compose_stages([*words, "data.validation_fraction=0"]) as chain:
            run_dir = prepare_run_dir(chain.pretraining.config).path
            write_model_description(chain.pretraining.config, run_dir)
        train(load_config(run_dir), run_dir)
        assert world_model_facts(run_dir).trained

    def test_pinned_when_the_policy_begins(self, pretraining, policy):
        cfg, run_dir = policy
        assert cfg.world_model_sha256 is None
        for status in ("not begun", "stopped"):
            if status == "stopped":
                (pretraining / "summary.json").write_text(json.dumps({"status": status}))
            with pytest.raises(ConfigurationError, match=f"its pre-training is {status}; finish it"):
                pin_world_model(cfg, run_dir)
        (pretraining / "summary.json").unlink()
        train(load_config(pretraining), pretraining)
        train(load_config(run_dir), run_dir)
        pinned = world_model_facts(pretraining).sha256
        assert load_config(run_dir).world_model_sha256 == pinned

    @pytest.mark.parametrize("folder", ["", "world_model"])
    def test_whichever_folder_is_named(self, pretraining, policy, folder):
        cfg, run_dir = policy
        cfg.world_model = str(pretraining / folder)
        with pytest.raises(ConfigurationError, match="its pre-training is not begun"):
            pin_world_model(cfg, run_dir)
