"""Policies for single tasks in a pre-trained world model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from stored_cases import write_store
from tensordict import TensorDict
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.algorithm.base import updates_of
from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.envs.tasks import task_info
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import TaskWorldModel, WorldModelSpec, make_world_model, read_world_model, save_world_model
from pwm_torchrl.report.collect import read_run
from pwm_torchrl.report.run_tables import score_table
from pwm_torchrl.run import evaluation
from pwm_torchrl.run import load as load_module
from pwm_torchrl.run.evaluation import Episodes, LatentVariance
from pwm_torchrl.run.load import load_networks
from pwm_torchrl.run.stored_episodes import run_facts
from pwm_torchrl.training import evaluate_run, load_env, load_policy

TASKS = ("pendulum-swingup", "cup-catch")
SPEC = {"num_tasks": 2, "task_dim": 4, "action_dims": (1, 2), "reward_head": "two_hot", "reward_space": "symlog"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    return make_two_task_model(tmp_path_factory.mktemp("model") / "world_model")


def make_two_task_model(folder, seed=0):
    """A world model whose reward is not zero, as a new one's would be."""
    torch.manual_seed(seed)
    spec = WorldModelSpec(8, 2, 16, [16], [16], **SPEC)
    model = make_world_model(spec)
    torch.nn.init.normal_(model.reward.net[-1].weight)
    save_world_model(folder, model, spec, task_names=TASKS, observation_dims=(3, 8))
    return folder


def extraction_config(store, world_model, changes=None):
    return config(
        {
            "mode": "extract",
            "task": "cup-catch",
            "env": task_info("cup-catch").env_config(),
            "data.path": str(store),
            "world_model": str(world_model),
            "world_model_sha256": read_world_model(world_model)[1].sha256,
            "model.reward_head": "two_hot",
            "model.reward_space": "symlog",
            "model.dynamics.kind": "mlp",
            "training.eval_episodes": 0,
            **(changes or {}),
        }
    )


def test_policy_and_critics_learn_in_a_frozen_world_model(monkeypatch, store, world_model, tmp_path):
    summary, run = run_with(monkeypatch, extraction_config(store, world_model), tmp_path)
    assert summary["status"] == "finished"
    saved, _ = read_world_model(world_model)
    bound = run.networks.model
    assert isinstance(bound, TaskWorldModel)
    assert torch.equal(bound.encoder.net[0].weight, saved.encoder.net[0].weight)
    assert run.algorithm.optimizers.keys() == {"actor", "critic"}
    assert run.networks.actor.action_dim == 2
    checkpoint = run.loop.record.store.latest()
    names = {path.name.partition("-")[2] for path in checkpoint.rglob("*") if path.is_dir()}
    assert {"actor", "critic"} <= names
    assert not any("model" in name for name in names)


def test_critics_compute_in_the_unit_of_the_tasks_own_rewards(monkeypatch, store, tmp_path):
    """As imagined, in symlog space; the model comes with the unit of all its tasks."""
    torch.manual_seed(0)
    spec = WorldModelSpec(8, 2, 16, [16], [16], scale_rewards=True, normalize_observations=True, **SPEC)
    model = make_world_model(spec)
    model.reward_deviation.set(1000 * torch.randn(50, 1))
    save_world_model(tmp_path / "model", model, spec, task_names=TASKS, observation_dims=(3, 8))
    ignored = {"algorithm.critic_passes": 8, "algorithm.critic_minibatches": 4}
    changes = {"algorithm.name": "pwm", "algorithm.scale_rewards": True, **ignored}
    _, run = run_with(monkeypatch, extraction_config(store, tmp_path / "model", changes), tmp_path / "run")
    data = EpisodeStore.open(store)
    mine = [data.episode_rows(int(e)) for e in range(data.num_episodes) if data.task_names[data.task[e]] == "cup-catch"]
    rewards = torch.cat([torch.from_numpy(rows.reward[1:]) for rows in mine])
    expected = (rewards.sign() * rewards.abs().log1p()).std(correction=0)
    torch.testing.assert_close(run.networks.model.reward_deviation.value.squeeze(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(run.networks.critic.scale, run.networks.model.reward_deviation.value)


def test_a_store_with_fewer_transitions_than_random_steps_is_learned_from(monkeypatch, store, world_model, tmp_path):
    run_with(monkeypatch, extraction_config(store, world_model, {"algorithm.random_steps": 10**6}), tmp_path)
    assert all(row["loss/actor"] for row in rows_of(tmp_path))


def test_policy_comes_back_from_its_run(monkeypatch, store, world_model, tmp_path):
    _, run = run_with(monkeypatch, extraction_config(store, world_model), tmp_path)
    _, networks = load_networks(tmp_path, "latest")
    observation = torch.randn(5, 8)
    assert torch.equal(networks.model.encode(observation), run.networks.model.encode(observation))
    assert_equal(networks.actor.state_dict(), run.networks.actor.state_dict())


@pytest.mark.parametrize("evaluated", [0, 1])
def test_policy_acts_in_the_range_of_its_task(evaluated, monkeypatch, store, world_model, tmp_path):
    """Which the registry does not know: the run has seen it, or the environment is made."""
    pytest.importorskip("dm_control")
    changes = {"training.epochs": 1, "training.eval_episodes": evaluated, "env.episode_length": 5}
    _, run = run_with(monkeypatch, extraction_config(store, world_model, changes), tmp_path)
    assert run.loop.record.facts["action_low"] == ((-1.0, -1.0) if evaluated else ())
    policy, env = load_policy(tmp_path, "latest"), load_env(tmp_path, 2)
    action = policy(TensorDict(observation=torch.randn(5, 8), batch_size=[5]))["action"]
    assert action.shape == (5, 2)
    assert action.abs().max() <= 1
    assert env.rollout(3, policy).shape == (2, 3)


@pytest.mark.parametrize("success", [None, torch.tensor([True, False, True, True])], ids=["return", "success"])
def test_is_evaluated_on_the_scale_of_its_task(success, monkeypatch, store, world_model, tmp_path):
    pytest.importorskip("dm_control")
    run_with(monkeypatch, extraction_config(store, world_model, {"training.epochs": 1}), tmp_path)
    played = Episodes(*(torch.full((5, 4, 1), 2.0) for _ in range(4)), torch.ones(5, 4, 1, dtype=torch.bool), success)
    monkeypatch.setattr(load_module, "play", lambda env, policy, seed: played)
    result = evaluate_run(tmp_path, 4, which="latest")
    assert (result["return_mean"], result["score"]) == (10.0, 0.01)
    assert result.get("success_rate") == (None if success is None else 0.75)


def test_resumes_to_the_bit(monkeypatch, store, world_model, tmp_path):
    cfg = extraction_config(store, world_model, {"finetune": True})
    _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
    run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=stop_after(2))
    _, second = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
    assert_equal(weights_of(whole), weights_of(second))


def test_another_world_model_than_at_the_beginning(monkeypatch, store, world_model, tmp_path):
    cfg = extraction_config(store, world_model, {"world_model_sha256": "0" * 64})
    with pytest.raises(ConfigurationError, match="not the one that the run began with"):
        run_with(monkeypatch, cfg, tmp_path)


class TestFineTuning:
    def test_trains_the_world_model_on_the_task(self, monkeypatch, store, world_model, tmp_path):
        cfg = extraction_config(store, world_model, {"finetune": True})
        _, run = run_with(monkeypatch, cfg, tmp_path)
        saved, _ = read_world_model(world_model)
        assert not torch.equal(run.networks.model.encoder.net[0].weight, saved.encoder.net[0].weight)
        rows = rows_of(tmp_path)
        assert all(float(row["loss/model_reward"]) > 0 for row in rows)
        assert all(float(row["finetune/latent_variance"]) > 0 for row in rows)

    def test_tells_when_the_latents_collapse(self, monkeypatch, store, world_model, tmp_path, capsys):
        cfg = extraction_config(store, world_model, {"finetune": True})
        variances = iter([1.0, 0.5, 0.05, 0.01])
        monkeypatch.setattr(evaluation, "latent_variance", lambda algorithm: next(variances))
        run_with(monkeypatch, cfg, tmp_path)
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        (event,) = [event for event in events if event["event"] == "latent_collapse"]
        assert (event["first"], event["now"]) == (1.0, 0.05)
        assert "collapsed the latents" in capsys.readouterr().err

    def test_the_alarm_is_kept_by_a_resumed_run(self):
        watch = LatentVariance()
        assert [watch.enter(v) for v in (1.0, 0.05)] == [False, True]
        again = LatentVariance()
        again.load_state_dict(watch.state_dict())
        assert not again.enter(0.04)


def test_what_is_trained(store, world_model):
    cfg = extraction_config(store, world_model)
    assert tuple(updates_of(cfg)) == ("actor", "critic")
    cfg.finetune = True
    assert tuple(updates_of(cfg)) == ("model", "actor", "critic")
    cfg.mode = "pretrain"
    assert tuple(updates_of(cfg)) == ("model",)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"task": "walker-walk"}, "was not trained on task 'walker-walk'"),
            ({"task": "cup-cach"}, "did you mean cup-catch"),
            ({"task": None}, "set task=NAME"),
            ({"world_model": None}, "needs a pre-trained world model"),
            ({"data.path": None}, r"set data\.path"),
        ],
    )
    def test_one_sentence(self, store, world_model, changes, match):
        with pytest.raises(ConfigurationError, match=match):
            run_facts(extraction_config(store, world_model, changes))

    def test_dimensions_that_disagree(self, store, world_model, tmp_path):
        spec = WorldModelSpec(8, 2, 16, [16], [16], **{**SPEC, "action_dims": (1, 1)})
        save_world_model(tmp_path, make_world_model(spec), spec, task_names=TASKS, observation_dims=(3, 8))
        with pytest.raises(ConfigurationError, match=r"8 observation and 1 action dimensions for task 'cup-catch'"):
            run_facts(extraction_config(store, tmp_path))

    def test_a_task_without_data(self, world_model, tmp_path):
        store = write_store(tmp_path / "other", ["pendulum-swingup"])
        with pytest.raises(ConfigurationError, match="no data of task 'cup-catch'"):
            run_facts(extraction_config(store, world_model))


class TestScores:
    @pytest.fixture
    def runs(self, store, world_model, tmp_path):
        """Files of runs that were never made: two tasks, two seeds."""
        from pwm_torchrl.run.directory import save_config

        reports = []
        for seed in (0, 1):
            for task, score in (("cup-catch", 0.8), ("pendulum-swingup", 0.5)):
                folder = tmp_path / f"{task}{seed}"
                folder.mkdir()
                cfg = copy.deepcopy(extraction_config(store, world_model, {"task": task, "seed": seed}))
                save_config(cfg, folder)
                (folder / "metrics.csv").write_text(f"epoch,eval/score,eval/return_mean\n1,{score + 0.1 * seed},7\n")
                reports.append(read_run(folder))
        return reports

    def test_a_row_per_task_and_their_mean(self, runs):
        table = score_table(runs)
        rows = dict(table.rows)
        assert rows["pendulum-swingup"].startswith("55.0 ± 5.0")
        assert rows["cup-catch"].startswith("85.0 ± 5.0")
        assert rows["mean of 2 tasks"].startswith("70.0 [65.0, 75.0]")

    def test_one_seed_is_drawn_over_tasks(self, runs):
        rows = dict(score_table(runs[:2]).rows)
        assert rows["mean of 2 tasks"] == "65.0 [50.0, 80.0]"

    def test_nothing_without_extracted_policies(self):
        assert score_table([]) is None
