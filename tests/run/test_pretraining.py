"""Pre-training on stored episodes of several tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored_cases import write_store
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.cgroups import CgroupMemory
from pwm_torchrl.memory.readings import MachineMemory, Reading
from pwm_torchrl.modules import read_world_model
from pwm_torchrl.run.stored_episodes import (
    StoredSamples,
    open_store,
    outgrows_memory,
    pretraining_tasks,
    run_facts,
    scratch_directory,
    training_split,
)
from pwm_torchrl.run.validation import Validation

TASKS = ("pendulum-swingup", "cup-catch")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


def pretraining_config(store, changes=None):
    return config(
        {
            "mode": "pretrain",
            "data.path": str(store),
            "data.validation_fraction": 0.3,
            "model.reward_head": "two_hot",
            "model.loss.form": "tdmpc2",
            "model.loss.rho": 0.99,
            "algorithm.horizon": 4,
            "algorithm.model_batch": 16,
            "algorithm.model_updates": 4,
            "training.epochs": 4,
            "training.eval_every": 2,
            **(changes or {}),
        }
    )


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs") / "run"
        cfg = pretraining_config(store, {"training.epochs": 12, "algorithm.model_updates": 8})
        return *run_with(patch, cfg, folder), folder


class TestRun:
    def test_learns(self, run):
        summary, _, folder = run
        rows = rows_of(folder)
        assert summary["status"] == "finished"
        first, last = float(rows[0]["loss/model"]), float(rows[-1]["loss/model"])
        assert last < 0.9 * first
        assert summary["best_validation_loss"] <= float(rows[1]["validation/loss"])
        assert summary["agent_steps"] == 0

    def test_validates_every_task(self, run):
        _, _, folder = run
        row = rows_of(folder)[-1]
        for name in TASKS:
            assert float(row[f"validation/latent_mse/{name}"]) > 0
            assert float(row[f"validation/reward_nmse/{name}"]) > 0
        mean = sum(float(row[f"validation/reward_nmse/{name}"]) for name in TASKS) / 2
        assert float(row["validation/reward_nmse"]) == pytest.approx(mean)

    def test_measures_the_latents_of_a_trained_model(self, run):
        _, _, folder = run
        measured = [int(row["epoch"]) for row in rows_of(folder) if row["model/latent_variance"]]
        assert measured == [2, 4, 6, 8, 10, 12]
        assert all(float(row["model/latent_rank"] or 2) > 1 for row in rows_of(folder))
        assert "model/reward_nmse" not in rows_of(folder)[-1]  # held-out episodes have it: validation/reward_nmse

    def test_leaves_a_world_model(self, run):
        summary, made, folder = run
        model, facts = read_world_model(folder)
        assert facts.task_names == TASKS
        assert facts.observation_dims == (3, 8)
        assert tuple(facts.spec.action_dims) == (1, 2)
        assert facts.labels["validation_loss"] == summary["best_validation_loss"]
        validation = made.evaluation.validation
        assert type(model.reward) is type(made.networks.model.reward)
        assert facts.spec.num_tasks == 2
        assert validation.rows.keys() == set(TASKS)

    def test_every_parameter_learned(self, run):
        """The task embedding too: it was in no optimizer elsewhere."""
        _, made, _ = run
        names = dict(made.networks.model.named_parameters())
        optimizer = made.algorithm.optimizers["model"].optimizer
        for name, parameter in names.items():
            assert optimizer.state[parameter]["exp_avg_sq"].abs().sum() > 0, name


def test_resumes_to_the_bit(monkeypatch, store, tmp_path):
    cfg = pretraining_config(store)
    _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
    _, first = run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=stop_after(2))
    assert first.loop.epoch == 2
    summary, second = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
    assert summary["restarts"] == 1
    assert_equal(weights_of(whole), weights_of(second))
    ours, theirs = rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole")
    for row, other in zip(ours, theirs, strict=True):
        for key in (key for key in row if key.startswith(("loss/", "validation/"))):
            assert row[key] == other[key]


def test_a_store_with_fewer_transitions_than_random_steps_is_trained_on(monkeypatch, store, tmp_path):
    """As size=tiny sets them: no step is collected here, random or not."""
    run_with(monkeypatch, pretraining_config(store, {"algorithm.random_steps": 10**6}), tmp_path)
    assert all(float(row["loss/model"]) > 0 for row in rows_of(tmp_path))


def test_observations_are_normalised_for_each_task(monkeypatch, store, tmp_path):
    changes = {"algorithm.scale_rewards": True, "algorithm.normalize_observations": True}
    cfg = pretraining_config(store, changes)
    run_with(monkeypatch, cfg, tmp_path)
    model, _ = read_world_model(tmp_path)
    data = EpisodeStore.open(store)
    training = training_split(cfg, data)[0]
    rewards = []
    for place, (name, width) in enumerate(zip(TASKS, (3, 8), strict=True)):
        chosen = [e for e in training if data.task_names[data.task[e]] == name]
        episodes = [data.episode_rows(int(e)) for e in chosen]
        seen = torch.cat([torch.from_numpy(rows.observation[1:]) for rows in episodes])[:, :width]
        rewards += [torch.from_numpy(rows.reward[1:]) for rows in episodes]
        statistics = model.observation_statistics
        torch.testing.assert_close(statistics.mean[place, :width], seen.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.var[place, :width], seen.var(0, unbiased=False), rtol=1e-3, atol=1e-4)
    deviation = torch.cat(rewards).std(correction=0)
    torch.testing.assert_close(model.reward_deviation.statistics.var.sqrt().squeeze(), deviation, rtol=1e-3, atol=1e-5)


def test_the_best_by_validation_is_kept(monkeypatch, store, tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Validation, "run", lambda self, *args: {"validation/loss": next(losses)})
    cfg = pretraining_config(store, {"training.eval_every": 1, "training.epochs": 3})
    summary, run = run_with(monkeypatch, cfg, tmp_path)
    _, facts = read_world_model(tmp_path)
    assert facts.labels["epoch"] == 2
    assert summary["best_validation_loss"] == 1.0
    assert run.loop.record.store.best().name.endswith("000002")


def test_training_never_sees_what_validation_does(store):
    episodes = EpisodeStore.open(store)
    training, held_out = training_split(pretraining_config(store), episodes)
    assert len(training) + len(held_out) == episodes.num_episodes
    samples = StoredSamples(episodes, TASKS, 4, 8, 2, episodes=training)
    drawn = samples.index.sample(2000)
    assert not set(episodes.episode_of(drawn)) & set(held_out)


class TestSamples:
    def test_in_the_order_and_width_of_the_model(self, store):
        episodes = EpisodeStore.open(store)
        samples = StoredSamples(episodes, ["cup-catch", "pendulum-swingup"], 4, 8, 2)
        data = samples.sample_slices(64)
        # The model's first task is the store's second, which alone has a second action.
        assert set(data["task"].unique().tolist()) == {0, 1}
        second = data["action"][..., 1].abs().sum(1) > 0
        assert torch.equal(second, data["task"][:, 0] == 0)

    @pytest.mark.parametrize("most", [7, 10**6])
    def test_evenly_spaced_rows_are_of_the_task_and_have_rewards(self, store, most):
        data = EpisodeStore.open(store)
        samples = StoredSamples(data, TASKS, 4, 8, 2)
        rows = samples.evenly_spaced_rows("cup-catch", most)
        mine = data.task[data.episode_of(rows)]
        assert set(mine) == {data.task_names.index("cup-catch")}
        assert not set(rows) & set(data.first_row)
        assert len(set(rows)) == len(rows) == min(most, int(data.length[data.task == mine[0]].sum()))

    def test_one_task_alone(self, store):
        samples = StoredSamples(EpisodeStore.open(store), ["pendulum-swingup"], 4, 3, 1, labelled=False)
        data = samples.sample_slices(8)
        assert "task" not in data
        assert data["observation"].shape == (8, 4, 3)
        assert data["action"].shape == (8, 4, 1)
        assert samples.sample_observations(5).shape == (5, 3)


class TestBadInput:
    def test_tasks_without_data(self, store):
        cfg = pretraining_config(store, {"tasks": "cup-catch,walker-walk"})
        with pytest.raises(ConfigurationError, match=r"no episodes of walker-walk"):
            run_facts(cfg)

    def test_dimensions_that_disagree(self, store):
        episodes = EpisodeStore.open(store)
        episodes.action_dims = (1, 3)
        with pytest.raises(ConfigurationError, match="'cup-catch' has 8 observation and 3 action dimensions"):
            pretraining_tasks(pretraining_config(store), episodes)

    def test_no_data(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"set data\.path"):
            open_store(pretraining_config(tmp_path, {"data.path": None}))
        with pytest.raises(ConfigurationError, match="not an episode store"):
            open_store(pretraining_config(tmp_path))

    def test_no_scratch_directory(self, store, monkeypatch):
        for name in ("SLURM_TMPDIR", "TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        cfg = pretraining_config(store, {"data.stage": "scratch"})
        with pytest.raises(ConfigurationError, match=r"data\.scratch_dir"):
            scratch_directory(cfg)
        monkeypatch.setenv("TMPDIR", "/somewhere")
        assert str(scratch_directory(cfg)) == "/somewhere"


def test_a_subset_has_the_widths_of_its_own_tasks(store):
    cfg = pretraining_config(store, {"tasks": "pendulum-swingup"})
    facts = run_facts(cfg)
    assert (facts.observation_dim, facts.action_dim, facts.action_dims) == (3, 1, (1,))
    assert task_set("pendulum-swingup").observation_dim == 3


@pytest.mark.parametrize(
    ("ram", "limit", "expected"), [(1 << 30, None, False), (1 << 10, None, True), (1 << 30, 1 << 10, True)]
)
def test_a_store_that_memory_cannot_keep(store, ram, limit, expected):
    """A job's limit counts as the machine's memory does."""
    episodes = EpisodeStore.open(store)
    groups = () if limit is None else (CgroupMemory("/", Path("/"), 2, limit, "memory.max", 0),)
    machine = MachineMemory(total=ram, available=ram)
    assert outgrows_memory(episodes, Reading(0.0, cgroups=groups, machine=machine)) is expected
    assert not outgrows_memory(episodes, Reading(0.0))  # nothing is known


def test_pages_are_asked_for_ahead(store, monkeypatch):
    asked = []
    monkeypatch.setattr(EpisodeStore, "prefetch", lambda self, rows, horizon: asked.append((len(rows), horizon)))
    found = {}
    for ahead in (True, False):
        torch.manual_seed(0)
        samples = StoredSamples(EpisodeStore.open(store), TASKS, 4, 8, 2, ahead=ahead)
        found[ahead] = samples.sample_slices(5)
    assert asked == [(5, 4)]
    assert (found[True] == found[False]).all()
