"""``launch/world_model.py``: TD-MPC2's checkpoints become world models that policies can be extracted in."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.modules import WorldModelSpec, make_world_model, read_world_model

main = partial(run_command, "world_model")

TASKS = "pendulum-swingup,cup-catch"
THEIRS = {
    "encoder.net.": "_encoder.state.",
    "dynamics.net.": "_dynamics.",
    "reward.net.": "_reward.",
    "task.embedding.": "_task_emb.",
}


@pytest.fixture
def checkpoint(tmp_path):
    """A multi-task checkpoint in TD-MPC2's format, and the model that it holds."""
    torch.manual_seed(0)
    spec = WorldModelSpec(8, 2, 16, [24, 24], [32], num_tasks=2, task_dim=4, action_dims=(1, 2), reward_head="two_hot")
    model = make_world_model(spec)
    torch.nn.init.normal_(model.reward.net[-1].weight)
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next(ours for ours in THEIRS if name.startswith(ours))
        state[THEIRS[prefix] + name.removeprefix(prefix)] = tensor
    state |= {"_action_masks": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "_pi.0.weight": torch.zeros(2, 2)}
    file = tmp_path / "mt2.pt"
    torch.save({"model": state}, file)
    return file, model


def test_import(checkpoint, tmp_path, capsys):
    file, model = checkpoint
    folder = tmp_path / "imported"
    assert main(["import", str(file), str(folder), "--tasks", TASKS]) == 0
    told = capsys.readouterr().out
    assert "_encoder.state.0.weight" in told
    assert "encoder.net.0.weight" in told
    assert "left out 1 entries of policy and value networks: _pi.0.weight" in told
    assert "missing: nothing" in told
    imported, facts = read_world_model(folder)
    assert facts.task_names == task_set(TASKS).names
    assert facts.spec.reward_space == "symlog"
    observation, action, task = torch.randn(5, 8), torch.rand(5, 2), torch.tensor([0, 1, 1, 0, 1])
    latent = model.encode(observation, task)
    assert torch.equal(imported.encode(observation, task), latent)
    model.reward.space = "symlog"
    for ours, theirs in zip(imported(latent, action, task), model(latent, action, task), strict=True):
        assert torch.equal(ours, theirs)
    assert main(["show", str(folder)]) == 0
    assert "pendulum-swingup, cup-catch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "has 2 tasks but does not name them"),
        (["--tasks", "pendulum-swingup"], "action_dims"),
        (["--tasks", "cup-catch,pendulum-swingup"], "_action_masks"),
        (["--tasks", "pendulum-swingup,reacher-easy"], "takes 8 observation and 2 action dimensions"),
        (["--tasks", "pendulum-swingup,cup-cath"], "did you mean cup-catch"),
    ],
)
def test_other_tasks_than_it_was_trained_on(checkpoint, tmp_path, capsys, words, told):
    file, _ = checkpoint
    assert main(["import", str(file), str(tmp_path / "imported"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    file, _ = checkpoint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["import", str(file), str(tmp_path / "full"), "--tasks", TASKS]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.pt"), str(tmp_path / "new"), "--tasks", TASKS]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2
