"""load_policy, load_env, load_world_model and evaluate_run: what a run directory gives back."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.envs.transforms import ActionScaling, RenameTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import WorldModel as TorchRLWorldModel
from training_cases import assert_equal, config, rows_of, run_with

import pwm_torchrl
from pwm_torchrl.envs import factory, make_env
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run import load as load_module
from pwm_torchrl.run.checkpoints import EARLIER_NETWORKS, METRIC, CheckpointFault, CheckpointStore, checkpoint_metadata
from pwm_torchrl.run.claims import claimed
from pwm_torchrl.run.collector import evaluation_env_seed
from pwm_torchrl.run.directory import load_config, save_config
from pwm_torchrl.run.load import load_networks
from pwm_torchrl.training import evaluate_run, film_run, train


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


class TestDamagedManifest:
    """Which checkpoint is the best is read from manifests."""

    @pytest.mark.parametrize("change", [lambda text: text[:99], lambda text: text.replace('"epoch"', '"epoCh"')])
    def test_another_one_is_chosen_with_a_sentence(self, change, trained, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(trained[1].run_dir, run)
        store = CheckpointStore(run)
        best = store.pick("best")
        assert not capsys.readouterr().err
        manifest = best / "manifest.json"
        assert change(manifest.read_text()) != manifest.read_text()
        manifest.write_text(change(manifest.read_text()))
        assert store.pick("best") != best
        assert f"the checkpoint {best} cannot be read" in capsys.readouterr().err


class TestPolicy:
    def test_the_latest_is_the_trained_one(self, trained):
        run = trained[1]
        policy = pwm_torchrl.load_policy(run.run_dir, which="latest")
        data = observations()
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            found, expected = policy(data.clone()), run.evaluation.act(data.clone())
        torch.testing.assert_close(found["action"], 2 * expected["action"])
        assert (policy.in_keys, policy.out_keys) == (["observation"], ["action"])
        assert set(found.keys()) == {"observation", "action"}
        assert not any(p.requires_grad for p in policy.parameters())

    def test_is_deterministic_whatever_the_exploration_type(self, trained):
        policy = pwm_torchrl.load_policy(str(trained[1].run_dir))
        data = observations()
        expected = policy(data.clone())["action"]
        for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
            with set_exploration_type(kind):
                assert torch.equal(policy(data.clone())["action"], expected)
        collector = Collector(
            GymEnv("Pendulum-v1"), policy, frames_per_batch=4, total_frames=4, auto_register_policy_transforms=False
        )
        (batch,) = collector
        collector.shutdown()
        torch.testing.assert_close(batch["action"], policy(batch["observation"]))

    def test_explores_on_request(self, trained):
        policy = pwm_torchrl.load_policy(trained[1].run_dir, deterministic=False)
        data = observations(1000)
        first, second = policy(data.clone())["action"], policy(data.clone())["action"]
        assert (first != second).any()
        assert 1 < first.abs().max() <= 2
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            mode = policy(data.clone())["action"]
        torch.testing.assert_close(mode, pwm_torchrl.load_policy(trained[1].run_dir)(data.clone())["action"])

    def test_takes_tensors_and_any_batch(self, trained):
        policy = pwm_torchrl.load_policy(trained[1].run_dir)
        data = torch.randn(2, 4, 3)
        expected = policy(TensorDict(observation=data, batch_size=[2, 4]))["action"]
        assert expected.shape == (2, 4, 1)
        assert torch.equal(policy(data), expected)
        assert torch.equal(policy(observation=data), expected)
        torch.testing.assert_close(policy(data[0, 0]), expected[0, 0])
        assert torch.equal(policy(data.double()), expected), "as gymnasium's MuJoCo environments observe"
        nested = TensorDict(agent=TensorDict(observation=data[0], batch_size=[4]), batch_size=[])
        assert policy(nested["agent"])["action"].shape == nested["agent", "action"].shape == (4, 1)

    def test_best_is_the_one_that_was_evaluated_best(self, trained):
        summary, run = trained
        seeds = [evaluation_env_seed(run.cfg.seed, epoch, 3) for epoch in (2, 4, 6)]  # each from its own starts
        best = [evaluate_run(run.run_dir, episodes=3, seed=each)["return_mean"] for each in seeds]
        assert pytest.approx(summary["peak_return"]) in best
        result = evaluate_run(run.run_dir, episodes=3, seed=seeds[-1], which="latest")
        assert result["return_mean"] == pytest.approx(summary["final_return"])
        assert result["return_std"] == pytest.approx(summary["final_return_std"])


class TestUnits:
    """Whoever steps the environment, the torque is the same, and so is the return."""

    STEPS, EPISODES, SEED = 30, 3, 11

    @pytest.fixture
    def expected(self, trained):
        """What ``launch/evaluate.py`` tells."""
        return torch.tensor(evaluate_run(trained[1].run_dir, self.EPISODES, self.SEED)["returns"])

    def returns(self, env, policy):
        """Of a plain environment, one episode after the other from the seeds of the evaluation."""
        found = []
        for index in range(self.EPISODES):
            start = env.reset(seed=self.SEED + index)
            episode = env.rollout(self.STEPS, policy, auto_reset=False, tensordict=start)
            found.append(episode["next", "reward"].sum())
        return torch.stack(found)

    @pytest.mark.parametrize("given", [False, True], ids=["by default", "given the environment"])
    def test_in_a_plain_gym_env(self, trained, expected, given):
        env = GymEnv("Pendulum-v1")
        policy = pwm_torchrl.load_policy(trained[1].run_dir, env=env if given else None)
        torch.testing.assert_close(self.returns(env, policy), expected, rtol=1e-4, atol=0)

    def test_in_a_plain_gym_env_of_another_range(self, trained, expected):
        env = TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling(standard_normal=False))
        assert env.action_spec.space.low.item() == 0
        policy = pwm_torchrl.load_policy(trained[1].run_dir, env=env)
        torch.testing.assert_close(self.returns(env, policy), expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("given", [False, True], ids=["by default", "given the environment"])
    def test_in_the_runs_own(self, trained, expected, given):
        env = pwm_torchrl.load_env(trained[1].run_dir, self.EPISODES, self.SEED)
        assert (env.action_spec.space.low == -2).all()
        policy = pwm_torchrl.load_policy(trained[1].run_dir, env=env if given else None)
        found = env.rollout(self.STEPS, policy)["next", "reward"].sum(1).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)

    def test_in_the_one_that_training_sees(self, trained, expected):
        env = make_env(trained[1].cfg.env, num_envs=self.EPISODES, seed=self.SEED)
        policy = pwm_torchrl.load_policy(trained[1].run_dir, env=env)
        episodes = env.rollout(self.STEPS, policy)
        assert episodes["action"].abs().max() <= 1
        torch.testing.assert_close(episodes["next", "reward"].sum(1).flatten(), expected, rtol=1e-4, atol=0)

    def test_the_own_one_begins_with_the_evaluations_seed(self, trained):
        env = pwm_torchrl.load_env(trained[1].run_dir, num_envs=2)
        found = env.rollout(self.STEPS, pwm_torchrl.load_policy(trained[1].run_dir))["next", "reward"].sum(1)
        assert found.flatten().tolist() == pytest.approx(evaluate_run(trained[1].run_dir, 2)["returns"], rel=1e-4)

    def test_an_environment_with_other_names(self, trained, expected):
        names = RenameTransform(["observation"], [("state", "vector")], ["action"], [("state", "torque")])
        env = TransformedEnv(GymEnv("Pendulum-v1"), names)
        policy = pwm_torchrl.load_policy(trained[1].run_dir, env=env)
        assert (policy.in_keys, policy.out_keys) == ([("state", "vector")], [("state", "torque")])
        torch.testing.assert_close(self.returns(env, policy), expected, rtol=1e-4, atol=0)

    def test_an_environment_that_does_not_fit(self, trained):
        with pytest.raises(ConfigurationError, match=r"GymEnv .*'observation' \[2\].* 3 numbers"):
            pwm_torchrl.load_policy(trained[1].run_dir, env=GymEnv("MountainCarContinuous-v0"))


class TestRunsThatDoNotSayTheirRange:
    """Those from before checkpoints held it."""

    @pytest.fixture(autouse=True)
    def _forgotten(self, trained, monkeypatch):
        path = CheckpointStore(trained[1].run_dir).latest()
        saved = checkpoint_metadata(path)["facts"]
        assert (list(saved["action_low"]), list(saved["action_high"])) == ([-2.0], [2.0])

        def without(path):
            metadata = checkpoint_metadata(path)
            kept = {key: value for key, value in metadata["facts"].items() if not key.startswith("action_")}
            return {**metadata, "facts": {**kept, "action_dim": 1}}

        monkeypatch.setattr(load_module, "checkpoint_metadata", without)

    def test_it_is_read_from_their_environment(self, trained):
        policy = pwm_torchrl.load_policy(trained[1].run_dir)
        observation = torch.randn(1000, 3)
        networks = load_networks(trained[1].run_dir)[1]
        within_one = networks.actor(networks.model.encode(observation))[0].tanh()
        torch.testing.assert_close(policy(observation), 2 * within_one)  # the pendulum's torque is in [-2, 2]

    def test_whose_library_has_to_be_there_unless_an_environment_is_given(self, trained, monkeypatch):
        def missing(*args, **kwargs):
            raise MissingLibraryError("gymnasium is not installed")

        monkeypatch.setattr(factory, "make_env", missing)
        env = GymEnv("Pendulum-v1")
        with pytest.raises(MissingLibraryError, match=r"load_policy\(run, env=\.\.\.\): gymnasium is not installed"):
            pwm_torchrl.load_policy(trained[1].run_dir)
        assert pwm_torchrl.load_policy(trained[1].run_dir, env=env).out_keys == ["action"]


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
        epochs = [saved.epoch for saved in CheckpointStore(run_dir).resume_candidates()]
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
        assert ffmpeg.count_frames_and_secs(str(file))[0] == trained[1].source.info.episode_length

    def test_an_environment_that_fails_is_closed(self, trained, monkeypatch):
        closed = []

        class Env:
            is_closed = False

            def close(self):
                closed.append(True)

        monkeypatch.setattr(factory, "make_env", lambda *args, **kwargs: Env())
        with pytest.raises(ConfigurationError, match="not a TorchRL environment"):
            evaluate_run(trained[1].run_dir)
        assert closed == [True]


class TestWorldModel:
    def test_is_torchrls(self, trained):
        run = trained[1]
        module = pwm_torchrl.load_world_model(run.run_dir, which="latest")
        assert isinstance(module, TorchRLWorldModel)
        model = run.networks.model
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
        assert pwm_torchrl.load_env(tmp_path).batch_size == (1,), "which needs none"

    def test_no_environment(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"is not a run directory"):
            pwm_torchrl.load_env(tmp_path)
        save_config(config({"mode": "pretrain"}), tmp_path)
        with pytest.raises(ConfigurationError, match=r"pre-trained a world model .* has no environment"):
            pwm_torchrl.load_env(tmp_path)

    def test_unknown_choice(self, trained):
        with pytest.raises(ConfigurationError, match=r"which='newest' is not one of best, last, latest"):
            pwm_torchrl.load_policy(trained[1].run_dir, which="newest")

    def test_damaged_checkpoint(self, trained, tmp_path):
        run_dir = tmp_path / "copy"
        shutil.copytree(trained[1].run_dir, run_dir)
        file = next(CheckpointStore(run_dir).latest().glob("components/*-actor/state.safetensors"))
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


class TestEarlierVersion:
    """A checkpoint as version 2 wrote it: the networks had other names, and a run had other parts."""

    @pytest.fixture
    def earlier(self, trained, tmp_path):
        run = trained[1]
        folder = tmp_path / "run"
        shutil.copytree(run.run_dir, folder, ignore=shutil.ignore_patterns("checkpoints", "claims"))
        networks = load_networks(run.run_dir, "latest")[1]
        names = EARLIER_NETWORKS[2]
        saved = Checkpoint(**{names.get(name, name): network for name, network in networks.items()})
        facts = Checkpoint.manifest(CheckpointStore(run.run_dir).latest())["metadata"]["facts"]
        with claimed(folder, []) as claim:
            CheckpointStore(folder, claim=claim).save(
                saved, 6, {"schema_version": 2, "epoch": 6, "facts": facts, "replay_steps": 24, METRIC: -1.0}
            )
        return folder

    def test_its_networks_are_those_that_it_saved(self, trained, earlier):
        for which in ("latest", "best"):
            _, networks = load_networks(earlier, which)
            for name, network in trained[1].networks.items():
                assert_equal(dict(networks.items())[name].state_dict(), network.state_dict())

    def test_its_policy_is_evaluated(self, trained, earlier):
        seed = evaluation_env_seed(trained[1].cfg.seed, 6, 3)
        result = evaluate_run(earlier, episodes=3, seed=seed)
        assert result["return_mean"] == pytest.approx(trained[0]["final_return"])

    def test_its_run_is_not_resumed(self, trained, earlier):
        with pytest.raises(CheckpointFault, match=r"schema version 2, .* not resume; begin a new run") as caught:
            train(trained[1].cfg, earlier, resume=True)
        assert "\n" not in str(caught.value)
        assert "can load the networks and evaluate" in str(caught.value)


def test_another_default_precision_changes_nothing(trained, tmp_path):
    """Of the program around: the networks are in float32, and an interrupted run goes on to the bit."""
    expected = evaluate_run(trained[1].run_dir, episodes=2)["returns"]
    cfg = trained[1].cfg
    train(cfg, tmp_path / "straight")
    torch.set_default_dtype(torch.float64)
    try:
        policy = pwm_torchrl.load_policy(trained[1].run_dir)
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
        assert policy(torch.randn(5, 3)).shape == (5, 1)
        env = pwm_torchrl.load_env(trained[1].run_dir, 2)
        assert env.rollout(3, policy)["action"].dtype == torch.float32
        assert evaluate_run(trained[1].run_dir, episodes=2)["returns"] == expected
        train(cfg, tmp_path / "double")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows_of(tmp_path / "double") == rows_of(tmp_path / "straight")
