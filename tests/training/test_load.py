"""load_policy, load_world_model and evaluate_run: what a run directory gives back."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import WorldModel as TorchRLWorldModel
from training_cases import assert_equal, config, rows_of, run_with

import pwm_torchrl
from pwm_torchrl.envs import make_env
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training import evaluate_run, film_run
from pwm_torchrl.training.checkpoint import CheckpointFault
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.config_file import load_config, save_config
from pwm_torchrl.training.load import load_networks
from pwm_torchrl.training.seeding import evaluation_env_seed


@pytest.fixture(scope="module", params=["plain", "termination_and_statistics"])
def trained(request, tmp_path_factory):
    """A finished run and its parts; the learning rate makes the epochs differ."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    changes = {"algorithm.actor_lr": 0.05, "training.epochs": 6}
    if request.param != "plain":
        changes |= {"model.termination_head": True, "algorithm.normalize_observations": True}
        changes |= {"model.reward_head": "two_hot"}
    with pytest.MonkeyPatch.context() as patch:
        run_dir.mkdir()
        save_config(config(changes), run_dir)
        return run_with(patch, config(changes), run_dir)


def observations(count=5):
    return TensorDict(observation=torch.randn(count, 3), batch_size=[count])


class TestPolicy:
    def test_the_latest_is_the_trained_one(self, trained):
        run = trained[1]
        policy = pwm_torchrl.load_policy(run.run_dir, which="latest")
        data = observations()
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            found, expected = policy(data.clone()), run.policy(data.clone())
        assert torch.equal(found["action"], expected["action"])
        assert torch.equal(found["latent"], expected["latent"])
        assert (policy.in_keys, policy.out_keys[-1]) == (["observation"], "action")
        assert not any(p.requires_grad for p in policy.parameters())

    def test_samples_by_default(self, trained):
        policy = pwm_torchrl.load_policy(str(trained[1].run_dir))
        data = observations()
        first, second = policy(data.clone())["action"], policy(data.clone())["action"]
        assert (first != second).all()
        assert first.abs().max() <= 1

    def test_acts_in_an_environment(self, trained):
        cfg = trained[1].cfg
        env = make_env(cfg.env, num_envs=2, seed=0)
        assert env.rollout(5, pwm_torchrl.load_policy(trained[1].run_dir)).shape == (2, 5)

    def test_best_is_the_one_that_was_evaluated_best(self, trained):
        summary, run = trained
        seed = evaluation_env_seed(run.cfg.seed)
        result = evaluate_run(run.run_dir, episodes=3, seed=seed)
        assert result["return_mean"] == pytest.approx(summary["peak_return"])
        result = evaluate_run(run.run_dir, episodes=3, seed=seed, which="latest")
        assert result["return_mean"] == pytest.approx(summary["final_return"])
        assert result["return_std"] == pytest.approx(summary["final_return_std"])


class TestEvaluate:
    def test_episodes_and_seed(self, trained):
        run_dir = trained[1].run_dir
        result = evaluate_run(run_dir)
        assert result["episodes"] == len(result["returns"]) == 10
        assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 10)
        assert evaluate_run(run_dir) == result
        assert evaluate_run(run_dir, seed=1)["returns"] != result["returns"]

    def test_a_checkpoint_by_its_epoch(self, trained):
        run_dir = trained[1].run_dir
        epochs = [saved.epoch for saved in CheckpointStore(run_dir).countable()]
        assert len(epochs) > 1
        found = {epoch: evaluate_run(run_dir, episodes=2, which=epoch) for epoch in epochs}
        assert [result["epoch"] for result in found.values()] == epochs
        assert len({tuple(result["returns"]) for result in found.values()}) > 1
        for which in ("last", "latest", str(epochs[-1])):
            assert evaluate_run(run_dir, episodes=2, which=which) == found[epochs[-1]]
        with pytest.raises(ConfigurationError, match="no checkpoint of epoch 99") as error:
            load_networks(run_dir, which=99)
        for epoch in epochs:
            assert str(epoch) in str(error.value)
        assert "last" in str(error.value)

    def test_a_torn_summary_does_not_matter(self, trained, tmp_path):
        shutil.copytree(trained[1].run_dir, tmp_path / "copy")
        expected = evaluate_run(tmp_path / "copy", episodes=2)
        for name in ("summary.json", "metrics.csv"):
            (tmp_path / "copy" / name).write_bytes(b"")
        assert evaluate_run(tmp_path / "copy", episodes=2) == expected

    def test_a_video_is_of_the_first_episode(self, trained, tmp_path):
        ffmpeg = pytest.importorskip("imageio_ffmpeg")
        pytest.importorskip("pygame")
        file = film_run(trained[1].run_dir, tmp_path / "film.mp4")
        assert ffmpeg.count_frames_and_secs(str(file))[0] == trained[1].info.episode_length

    def test_an_environment_that_fails_is_closed(self, trained, monkeypatch):
        closed = []

        class Env:
            def close(self):
                closed.append(True)

        monkeypatch.setattr("pwm_torchrl.training.load.make_env", lambda *args, **kwargs: Env())
        with pytest.raises(TypeError, match="was not made by pwm_torchrl"):
            evaluate_run(trained[1].run_dir)
        assert closed == [True]


class TestWorldModel:
    def test_is_torchrls(self, trained):
        run = trained[1]
        module = pwm_torchrl.load_world_model(run.run_dir, which="latest")
        assert isinstance(module, TorchRLWorldModel)
        model = run.networks.world_model
        data = observations()
        data["action"] = torch.rand(5, 1) * 2 - 1
        out = module(data.clone())
        with torch.no_grad():
            latent = model.encode(data["observation"])
            following, reward, terminated = model(latent, data["action"])
        assert torch.equal(out["latent"], latent)
        assert torch.equal(out["next", "latent"], following)
        assert torch.equal(out["next", "reward"], reward)
        if model.termination is not None:
            assert torch.equal(out["next", "done"], terminated)

    def test_networks_are_equal_to_the_bit(self, trained):
        run = trained[1]
        cfg, networks = load_networks(run.run_dir, which="latest")
        assert cfg == load_config(run.run_dir)
        for (_, found), (_, expected) in zip(networks.items(), run.networks.items(), strict=True):
            assert_equal(found.state_dict(), expected.state_dict())
            assert not found.training


class TestRefused:
    def test_no_run_directory(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"is not a run directory: it has no config.yaml"):
            pwm_torchrl.load_policy(tmp_path)

    def test_no_checkpoint(self, tmp_path):
        save_config(config(), tmp_path)
        for load in (pwm_torchrl.load_policy, pwm_torchrl.load_world_model, evaluate_run):
            with pytest.raises(ConfigurationError, match=r"has no checkpoint yet\."):
                load(tmp_path)

    def test_unknown_choice(self, trained):
        with pytest.raises(ConfigurationError, match=r"which='newest' is not one of best, last, latest"):
            pwm_torchrl.load_policy(trained[1].run_dir, which="newest")

    def test_damaged_checkpoint(self, trained, tmp_path):
        run_dir = tmp_path / "copy"
        shutil.copytree(trained[1].run_dir, run_dir)
        file = next(CheckpointStore(run_dir).latest().glob("components/*-actor/state/tensor_00000000.memmap"))
        file.write_bytes(file.read_bytes()[:3])
        with pytest.raises(CheckpointFault, match=r"truncated or damaged"):
            pwm_torchrl.load_policy(run_dir, which="latest")

    def test_configuration_edited_afterwards(self, trained, tmp_path):
        run_dir = tmp_path / "copy"
        shutil.copytree(trained[1].run_dir, run_dir)
        cfg = load_config(run_dir)
        cfg.size.actor_units = [24]
        save_config(cfg, run_dir)
        with pytest.raises(ConfigurationError, match=r"belongs to another configuration"):
            pwm_torchrl.load_policy(run_dir)


def test_a_moved_run_still_loads(trained, tmp_path):
    shutil.copytree(trained[1].run_dir, tmp_path / "elsewhere")
    assert pwm_torchrl.load_policy(tmp_path / "elsewhere").out_keys[-1] == "action"
    assert rows_of(tmp_path / "elsewhere") == rows_of(trained[1].run_dir)
