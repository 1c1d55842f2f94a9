"""PWM in TorchRL's Trainer: one set of networks, updates that learn, and parts that do not fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler
from torchrl.envs import GymEnv
from torchrl.trainers.trainers import TrainerHookBase

from pwm_torchrl.config import AlgorithmConfig
from pwm_torchrl.envs import make_gymnasium_env
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import Actor, CriticEnsemble, WorldModelSpec, make_world_model
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.plugin.trainer import ReplaySlices
from pwm_torchrl.training import make_torchrl_trainer

ALGORITHM = {"horizon": 4, "model_batch": 8, "actor_batch": 8, "model_updates": 2, "critic_passes": 1}

#: By their names, the arguments that give them.
NETWORKS = {"model": "world_model", "actor": "actor", "critic": "critics"}


def parts(num_envs=1, env=None, frames=32, **changes):
    """Arguments of a small training, some of them others."""
    env = make_gymnasium_env("Pendulum-v1", num_envs=num_envs) if env is None else env
    keys = {"traj_key": ("collector", "traj_ids")} if num_envs > 1 else {}
    return {
        "collector": partial(
            Collector, env, frames_per_batch=frames, total_frames=-1, auto_register_policy_transforms=False
        ),
        "total_frames": 3 * frames,
        "replay_buffer": ReplayBuffer(storage=LazyTensorStorage(500), sampler=SliceSampler(slice_len=4, **keys)),
        "world_model": make_world_model(WorldModelSpec(3, 1, 16, [32], [32], normalize_observations=True)),
        "actor": Actor(16, 1, [32]),
        "critics": CriticEnsemble(16, [32]),
        "algorithm": ALGORITHM,
        "progress_bar": False,
        **changes,
    }


def pointers(module):
    return {p.data_ptr() for p in module.parameters()}


class Rows(TrainerHookBase):
    """Keeps what is logged of each batch's updates."""

    def __init__(self):
        self.rows = []

    def __call__(self, optim_steps, losses):
        self.rows.append(dict(losses.items()))

    def register(self, trainer, name="rows"):
        trainer.register_op("post_optim_complete_log", self)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_all_parts_share_one_set_of_networks_and_learn(num_envs):
    torch.manual_seed(0)
    rows = Rows()
    given = parts(
        num_envs,
        hooks=[rows],
        model_loss=partial(PWMModelLoss, rho=0.5),
        loss_module=partial(PWMActorLoss, horizon=3),
        value_loss=PWMValueLoss,
    )
    trainer = make_torchrl_trainer(**given)
    updates = trainer.optimization_stepper
    actor = pointers(given["actor"])
    assert pointers(trainer.loss_module) == actor <= pointers(trainer.collector.policy)
    assert {p.data_ptr() for p in updates.algorithm.losses.model.parameters()} == pointers(given["world_model"])
    assert trainer.loss_module.horizon == 3
    before = {k: [p.clone() for p in given[k].parameters()] for k in NETWORKS.values()}
    trainer.train()
    assert len(rows.rows) == 3
    assert trainer.collected_frames == 96 == len(given["replay_buffer"])
    assert {"loss/model", "loss/actor", "loss/critic"} <= rows.rows[0].keys()
    assert rows.rows[-1]["lr/actor"] == pytest.approx(AlgorithmConfig().final_lr)
    for name, old in before.items():
        assert any((a != b).any() for a, b in zip(old, given[name].parameters())), name
    assert given["world_model"].observation_statistics.count >= 96


def test_frames_before_the_first_update_are_stored():
    env = make_gymnasium_env("Pendulum-v1")
    collector = partial(Collector, env, frames_per_batch=32, total_frames=-1, init_random_frames=64,
                        auto_register_policy_transforms=False)  # fmt: skip
    given = parts(env=env, collector=collector)
    trainer = make_torchrl_trainer(**given)
    trainer.train()
    assert trainer._optim_count == 2
    assert len(given["replay_buffer"]) == 96


def test_state_holds_networks_and_optimizers():
    given = parts()
    trainer = make_torchrl_trainer(**given)
    states = []
    trainer.register_op("post_steps", lambda: states.append(trainer.state_dict()))  # a collector that is shut has none
    trainer.train()
    state = states[-1]
    other = make_torchrl_trainer(**parts())
    other.load_state_dict(state)
    networks = dict(other.optimization_stepper.algorithm.networks.items())
    for name, key in NETWORKS.items():
        ours, theirs = given[key].state_dict(), networks[name].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    moments = other.optimization_stepper.algorithm.optimizers["actor"].optimizer.state_dict()["state"]
    assert torch.equal(moments[0]["exp_avg"], state["actor_optimizer"]["state"][0]["exp_avg"])
    assert other.optimization_stepper.epoch == 3


MULTITASK = WorldModelSpec(3, 1, 16, [32], [32], num_tasks=1, task_dim=4, action_dims=[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"horizn": 4}}, "algorithm.horizn is not a setting of the algorithm; nearest: horizon"),
        (
            {"algorithm": {**ALGORITHM, "random_steps": 5}},
            "algorithm.random_steps=5 has no effect .* collector.init_random",
        ),
        ({"algorithm": {**ALGORITHM, "temperature": 1.0}}, r"temperature=1\.0 has no effect .*algorithm=pwm_paper"),
        ({"algorithm": {**ALGORITHM, "horizon": 0}}, r"algorithm\.horizon=0 .*at least 1"),
        ({"algorithm": {**ALGORITHM, "name": "pwm"}}, r"algorithm\.name=pwm .* pwm_paper"),
        ({"algorithm": AlgorithmConfig(name="shac")}, r"algorithm\.name=shac .* pwm_paper"),
        ({"algorithm": {**ALGORITHM, "actor_starts": "x"}}, r"algorithm\.actor_starts=x .*replay, current"),
        ({"algorithm": AlgorithmConfig()}, "slice_len=4 does not give slices of algorithm.horizon=16"),
        ({"algorithm": AlgorithmConfig(slice_steps=3)}, "slice_len=4 does not give slices of algorithm.slice_steps=3"),
        ({"replay_buffer": ReplayBuffer(storage=LazyTensorStorage(9))}, "RandomSampler does not give slices"),
        ({"world_model": make_world_model(MULTITASK)}, "world_model.num_tasks=1"),
        ({"value_loss": PWMValueLoss(CriticEnsemble(16, [32]))}, "value_loss is a finished PWMValueLoss.*_partial_"),
        ({"loss_module": lambda **_: PWMValueLoss(CriticEnsemble(16, [32]))}, "loss_module makes a PWMValueLoss"),
        ({"collector": "sync"}, "collector is a finished str"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        make_torchrl_trainer(**parts(**changes))


def test_actions_of_another_range():
    with pytest.raises(ConfigurationError, match=r"actions are in \[-2, 2\], but PWM acts in \[-1, 1\]"):
        make_torchrl_trainer(**parts(env=GymEnv("Pendulum-v1")))


# Slices and start states from a TorchRL replay buffer -----------------------------------------------------------------


def batch(envs: int, steps: int, length: int, first: int = 0) -> TensorDict:
    """What a collector gives: observation (environment, step), episodes of ``length``."""
    step = torch.arange(first, first + steps).expand(envs, steps)
    env = torch.arange(envs).unsqueeze(1).expand(envs, steps)
    done = (step % length == length - 1).unsqueeze(-1)
    data = TensorDict(
        observation=torch.stack([env, step], -1).float(),
        next=TensorDict(done=done, truncated=done, terminated=torch.zeros_like(done), batch_size=[envs, steps]),
        collector=TensorDict(traj_ids=step // length * envs + env, batch_size=[envs, steps]),
        batch_size=[envs, steps],
    )
    return data if envs > 1 else data[0]


def slices(envs: int, ndim: int = 1, **sampler) -> ReplaySlices:
    storage = LazyTensorStorage(400, ndim=ndim)
    buffer = ReplayBuffer(
        storage=storage, sampler=SliceSampler(slice_len=4, **sampler), dim_extend=1 if ndim > 1 else None
    )
    return ReplaySlices(buffer, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("envs", "ndim", "sampler"),
    [(1, 1, {}), (3, 1, {"traj_key": ("collector", "traj_ids")}), (3, 2, {})],
    ids=["one environment", "several in one row", "several in rows of their own"],
)
def test_slices_are_of_one_episode_and_environment(envs, ndim, sampler):
    replay = slices(envs, ndim, **sampler)
    assert not replay.can_sample
    for first in (0, 20):
        data = batch(envs, 20, 10, first)
        assert replay.extend(data) is data
    assert replay.can_sample
    drawn = replay.sample_slices(64)["observation"]
    assert drawn.shape == (64, 4, 2)
    assert (drawn[..., 0] == drawn[:, :1, 0]).all()
    assert (drawn[..., 1].diff(dim=1) == 1).all()
    assert (drawn[:, 0, 1] // 10 == drawn[:, -1, 1] // 10).all()
    assert {tuple(row) for row in drawn[:, 0].tolist()} & {(float(envs - 1), float(s)) for s in range(40)}


def test_start_states_are_of_every_step_of_a_slice():
    replay = slices(1)
    replay.extend(batch(1, 10, 10))
    observations = replay.sample_observations(500)
    assert observations.shape == (500, 2)
    assert set(observations[:, 1].tolist()) == set(map(float, range(10)))


def test_padded_steps_are_no_start_states():
    replay = slices(1, strict_length=False, pad_output=True)
    replay.extend(batch(1, 3, 3))  # shorter than a slice
    assert replay.sample_slices(5).shape == (5, 4)
    assert set(replay.sample_observations(200)[:, 1].tolist()) == {0.0, 1.0, 2.0}


def test_environments_that_the_sampler_cannot_tell_apart():
    with pytest.raises(ConfigurationError, match=r"cannot tell 3 environments apart .* set traj_key="):
        slices(3).extend(batch(3, 20, 10))


def test_slices_of_several_lengths():
    with pytest.raises(ConfigurationError, match="strict_length=False"):
        slices(1, strict_length=False)
