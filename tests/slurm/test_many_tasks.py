"""Pre-training and a policy per task on a real Slurm: the policies wait for their world model."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
from run_cases import summary
from stored_cases import write_store

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.modules import world_model_facts
from pwm_torchrl.run.directory import load_config

resume = partial(run_command, "resume")
main = partial(run_command, "submit")

TASKS = ("pendulum-swingup", "cup-catch")
FIRST = ("algorithm.slice_steps=4", "algorithm.model_batch=8", "algorithm.model_updates=2", "training.epochs=3")
SMALL = (
    *("experiment=extract", "task=all", "model=mlp", "size=tiny", "size.latent_dim=16", "size.units=[16]"),
    *("size.encoder_units=[16]", "size.actor_units=[8]", "size.critic_units=[8]", "data.validation_slices=4"),
    *("data.validation_fraction=0.2", "algorithm.horizon=4", "algorithm.actor_batch=4", "training.epochs=2"),
    *("training.eval_every=0", "training.eval_episodes=0", "cluster.mem_gib=1.2", "cluster.cpus=1"),
    *("cluster.time_min=5", "device=cpu"),
    *(f"pretraining.{word}" for word in (*FIRST, "training.eval_every=1")),
)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", TASKS)


def queued(out):
    """From what submitting says: (job, run directory, job that it waits for or "") of every run."""
    return re.findall(r"^job (\S+): (\S+?)(?:, after job (\S+))?$", out, re.MULTILINE)


def test_policies_wait_for_the_world_model(place, store, tmp_path, capsys):
    """One command: a job, an array behind it, and the store copied to the nodes' own disk once."""
    scratch = tmp_path / "scratch"
    words = [f"data.path={store}", f"runs_dir={tmp_path / 'runs'}", "data.stage=scratch", f"data.scratch_dir={scratch}"]
    blocker = place.cluster.sbatch("sleep 60", "-N2", "--exclusive", cwd=tmp_path)
    place.cluster.wait_state(blocker, {"RUNNING"})
    assert main([*SMALL, *words]) == 0
    (first, model, _), *policies = queued(capsys.readouterr().out)
    model = tmp_path / model
    assert len(policies) == 2
    for job, run, after in policies:
        assert after == first
        assert load_config(run).world_model == str(model)
        assert f"afterok:{first}" in place.cluster.job(job)["Dependency"]
    assert not world_model_facts(model).trained
    place.cluster.run(["scancel", blocker])
    for _, run, _ in policies:
        place.wait_for(tmp_path / run, "finished", 180)
        assert load_config(run).world_model_sha256 == world_model_facts(model).sha256
    assert summary(model)["status"] == "finished"
    assert len([path for path in scratch.iterdir() if path.is_dir()]) == 1


def test_a_pretraining_that_fails_takes_its_policies_along(place, store, tmp_path, capsys):
    """They are cancelled, and resume brings all back, in order."""
    words = [f"data.path={store}", f"runs_dir={tmp_path / 'runs'}"]
    moved = store.rename(tmp_path / "moved")
    moved.rename(store)
    blocker = place.cluster.sbatch("sleep 60", "-N2", "--exclusive", cwd=tmp_path)
    place.cluster.wait_state(blocker, {"RUNNING"})
    assert main([*SMALL, *words]) == 0
    (first, model, _), *policies = queued(capsys.readouterr().out)
    store.rename(moved)
    place.cluster.run(["scancel", blocker])
    place.cluster.wait_state(first, {"FAILED"})
    for job, _, _ in policies:
        place.cluster.wait_state(job, {"CANCELLED"})
    moved.rename(store)
    assert resume([str(tmp_path / "runs"), "--failed"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{model.rpartition('/')[2]}: job ")
    awaited = json.loads((tmp_path / model / "job.json").read_text())["awaited_by"]
    for _, run, _ in policies:
        assert place.job(tmp_path / run) in awaited
        place.wait_for(tmp_path / run, "finished", 180)
