"""A run that begins with the networks of another one: ``init_from``."""

from __future__ import annotations

import pytest
import torch
from training_cases import CARTPOLE, PENDULUM, assert_equal, config, run_with, weights_of

from pwm_torchrl.config import NETWORKS
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.load import check_warm_start, load_networks
from pwm_torchrl.training import train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run and its best networks."""
    run_dir = tmp_path_factory.mktemp("source")
    train(config({"training.epochs": 2, "training.eval_every": 1}), run_dir)
    return run_dir, dict(load_networks(run_dir, "best")[1].items())


def begun(monkeypatch, cfg, run_dir):
    """The networks of a run before its first update, and how it ended."""
    seen = {}

    def look(run):
        if not seen:
            seen.update({name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in run.networks.items()})

    return seen, run_with(monkeypatch, cfg, run_dir, during_epoch=look)


@pytest.mark.parametrize("parts", [["model", "actor", "critic"], ["model"], ["critic", "actor"]], ids="+".join)
def test_the_parts_are_taken_and_the_others_are_new(parts, source, tmp_path, monkeypatch):
    """In another environment: Pendulum with a time limit of its own, and another seed."""
    run_dir, theirs = source
    changes = {"training.epochs": 1, "init_from": str(run_dir), "init_from_parts": parts, "seed": 5}
    seen, (summary, _) = begun(monkeypatch, config(changes, {**PENDULUM, "g": 5.0}), tmp_path)
    for name in NETWORKS:
        equal = all(torch.equal(seen[name][key], value) for key, value in theirs[name].state_dict().items())
        assert equal == (name in parts), name
    assert (summary["status"], summary["epochs_done"], summary["restarts"]) == ("finished", 1, 0)


def test_a_resumed_run_goes_on_from_its_own_checkpoint(source, tmp_path, monkeypatch):
    train(config({"training.epochs": 1, "init_from": str(source[0])}), tmp_path)
    own = dict(load_networks(tmp_path, "last")[1].items())
    cfg = config({"training.epochs": 2, "init_from": str(tmp_path / "gone")})  # not needed any more
    seen = {}

    def look(run):
        seen.update({name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in run.networks.items()})

    summary, _ = run_with(monkeypatch, cfg, tmp_path, resume=True, during_epoch=look)
    assert summary["epochs_done"] == 2
    for name, network in own.items():
        assert_equal(seen[name], network.state_dict())


def test_the_same_start_gives_the_same_run(source, tmp_path, monkeypatch):
    cfg = config({"training.epochs": 2, "init_from": str(source[0])})
    runs = [run_with(monkeypatch, cfg, tmp_path / name)[1] for name in ("a", "b")]
    assert_equal(weights_of(runs[0]), weights_of(runs[1]))


@pytest.mark.parametrize(
    ("changes", "env", "said"),
    [
        ({}, CARTPOLE, ["model", "encoder.net.0.weight", "init_from_parts"]),
        ({"init_from_parts": ["actor"], "size.actor_units": [24]}, PENDULUM, ["actor", "[24"]),
        ({"init_from_parts": ["critic"], "size.latent_dim": 24}, PENDULUM, ["critic"]),
    ],
)
def test_other_dimensions_are_refused(changes, env, said, source, tmp_path):
    with pytest.raises(ConfigurationError, match=r"init_from=") as caught:
        train(config({"init_from": str(source[0]), **changes}, env), tmp_path)
    assert all(part in str(caught.value) for part in said)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_refused(source, tmp_path):
    with pytest.raises(ConfigurationError, match=r"init_from=.*nowhere"):
        check_warm_start(config({"init_from": str(tmp_path / "nowhere")}))
    cfg = config({"init_from": str(source[0])})
    cfg.mode = "pretrain"
    with pytest.raises(ConfigurationError, match=r"does not train actor, critic"):
        check_warm_start(cfg)
