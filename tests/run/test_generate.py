"""Episodes in TD-MPC2's format, played by random and trained policies, come back from a store."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict._reductions import _make_td
from training_cases import config, run_with

pytest.importorskip("dm_control")

from pwm_torchrl.cli.data import _behaviours
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.envs.tasks import task_info, task_set
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.new_episodes import Behaviour, generate_episodes

data_main = partial(run_command, "data")

NAMES = "pendulum-swingup,cup-catch"
RANDOM = {name: [Behaviour("random")] for name in NAMES.split(",")}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Three episodes of each task."""
    folder = tmp_path_factory.mktemp("data") / "chunks"
    assert data_main(["generate", "--tasks", NAMES, "--episodes", "3", "--seed", "4", "--out", str(folder)]) == 0
    return folder


def load(file):
    with torch.serialization.safe_globals([TensorDict, _make_td]):
        return torch.load(file, weights_only=True)


def test_the_published_layout(chunks):
    chunk = load(chunks / "chunk_1.pt")
    assert chunk.batch_size == (3, 501)
    assert {key: value.dtype for key, value in chunk.items()} == {
        "obs": torch.float32, "action": torch.float32, "reward": torch.float32, "task": torch.int32
    }  # fmt: skip
    assert chunk["action"][:, 0].isnan().all()
    assert chunk["reward"][:, 0].isnan().all()
    assert not chunk["action"][:, 1:].isnan().any()
    assert (chunk["task"] == 1).all()
    narrow = load(chunks / "chunk_0.pt")
    assert narrow["obs"].shape[-1] == 8
    assert (narrow["obs"][..., 3:] == 0).all()
    assert (narrow["action"][:, 1:, 1] == 0).all()


def test_episodes_differ_and_repeat(chunks, tmp_path):
    first = load(chunks / "chunk_0.pt")
    assert len(torch.unique(first["obs"][:, 0], dim=0)) == 3
    generate_episodes(tmp_path, task_set(NAMES), RANDOM, 3, seed=4)
    again = load(tmp_path / "chunk_0.pt")
    assert torch.equal(again["obs"], first["obs"])


def test_goes_on_where_it_was_interrupted(chunks, tmp_path):
    (tmp_path / "chunk_0.pt").write_bytes((chunks / "chunk_0.pt").read_bytes())
    stamp = (tmp_path / "chunk_0.pt").stat().st_mtime_ns
    generate_episodes(tmp_path, task_set(NAMES), RANDOM, 1)
    assert (tmp_path / "chunk_0.pt").stat().st_mtime_ns == stamp
    assert load(tmp_path / "chunk_1.pt").batch_size == (1, 501)


def test_import_keeps_every_transition(chunks, tmp_path):
    store = tmp_path / "store"
    assert data_main(["import", str(chunks), str(store), "--tasks", NAMES]) == 0
    episodes = EpisodeStore.open(store)
    assert (episodes.num_episodes, episodes.num_transitions) == (6, 3000)
    chunk = load(chunks / "chunk_1.pt")
    np.testing.assert_allclose(
        sorted(episodes.returns(np.flatnonzero(episodes.task == 1))), sorted(chunk["reward"][:, 1:].sum(1)), rtol=1e-5
    )


def test_a_trained_policy_acts_in_its_share(monkeypatch, tmp_path):
    env = {**task_info("pendulum-swingup").env_config(), "num_envs": 2, "episode_length": 20}
    changes = {"training.epochs": 1, "training.eval_every": 0, "training.eval_episodes": 1}
    run_with(monkeypatch, config(changes, env), tmp_path / "run")
    behaviours = _behaviours(["random", f"pendulum-swingup={tmp_path / 'run'}"], task_set(NAMES), 0.0)
    assert [b.policy for b in behaviours["cup-catch"]] == ["random"]
    one = task_set("pendulum-swingup")
    (file,) = generate_episodes(tmp_path / "chunks", one, {"pendulum-swingup": behaviours["pendulum-swingup"]}, 4)
    action = load(file)["action"][:, 1:, 0]
    steps = (action[:, 1:] - action[:, :-1]).abs().mean(1)
    assert (steps[:2] > 0.5).all(), "uniform actions jump"
    assert (steps[2:] < 0.5).all(), "a policy without noise does not"
    with pytest.raises(ConfigurationError, match=r"cup-catch=.*cup-catch observes .*\[8\], .* reads 3 numbers"):
        generate_episodes(
            tmp_path / "other", task_set("cup-catch"), {"cup-catch": [Behaviour(str(tmp_path / "run"))]}, 1
        )


def test_random_actions_that_are_held(tmp_path):
    """For 1 to 5 steps, about equally often, uniform, and never longer."""
    behaviours = _behaviours(["random:5"], task_set("cup-catch"), 0.3)
    assert behaviours == {"cup-catch": [Behaviour("random", 0.3, hold=5)]}
    (file,) = generate_episodes(tmp_path, task_set("cup-catch"), behaviours, 4)
    action = load(file)["action"][:, 1:]
    held = []
    for episode in action:
        changes = (episode[1:] != episode[:-1]).any(-1).nonzero().flatten()
        held.append(changes.diff())
    counts = torch.cat(held).bincount(minlength=6)
    assert len(counts) == 6
    assert counts[0] == 0
    assert (counts[1:] / counts.sum() - 0.2).abs().max() < 0.06
    assert action.abs().max() <= 1
    assert action.std() == pytest.approx(3**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "nowhere"], "neither 'random', 'random:N' nor a run directory"),
        (["--policy", "random:0"], "random:0: N in 'random:N'"),
        (["--policy", "cup-catch=random:x"], "random:x"),
        (["--policy", "cup-cacth=random"], "did you mean cup-catch"),
        (["--policy", "cup-catch=random"], "no policy was given for pendulum-swingup"),
        (["--episodes", "0"], "too small"),
        (["--noise=-1"], "must not be negative"),
    ],
)
def test_bad_input(tmp_path, words, told, capsys):
    assert data_main(["generate", "--tasks", NAMES, "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
