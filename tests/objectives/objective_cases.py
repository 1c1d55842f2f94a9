"""Small models and data for the tests of the objectives."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss
from pwm_torchrl.objectives.model_loss import Slices

OBS, A, D, H, B = 4, 3, 16, 5, 6
TASKS, DIMS = 4, (3, 1, 2, 3)
FLOW = {"kind": "flow", "substeps": 2}


def randomized(module: nn.Module, scale: float = 0.4, seed: int = 0) -> nn.Module:
    """Weights far from the initialisation, whose zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def world_model(tasks: bool = False, dtype: torch.dtype = torch.float32, **kwargs: object) -> WorldModel:
    multi = {"num_tasks": TASKS, "task_dim": 6, "action_dims": DIMS} if tasks else {}
    return randomized(make_world_model(WorldModelSpec(OBS, A, D, [12], [12], **multi, **kwargs)).to(dtype))


def slice_data(batch: int = B, horizon: int = H, tasks: bool = False, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Trajectory slices as PWMModelLoss reads them."""
    size, flags = (batch, horizon), torch.zeros(batch, horizon, 1, dtype=torch.bool)
    observation = torch.randn(batch, horizon + 1, OBS, dtype=dtype)
    data = TensorDict(
        observation=observation[:, :-1],
        action=2 * torch.rand(*size, A, dtype=dtype) - 1,
        next=TensorDict(
            observation=observation[:, 1:],
            reward=torch.randn(*size, 1, dtype=dtype),
            done=flags,
            terminated=flags.clone(),
            batch_size=size,
        ),
        batch_size=size,
    )
    if tasks:
        data["task"] = (torch.arange(batch) % TASKS).unsqueeze(1).expand(size)
    return data


def time_major(data: TensorDict) -> Slices:
    """The same, written out for the pure functions."""
    next_ = data["next"].transpose(0, 1)
    done = next_["done"].int()
    return Slices(
        data["observation"][:, 0],
        next_["observation"],
        data["action"].transpose(0, 1),
        next_["reward"],
        next_["terminated"],
        (done.cumsum(0) - done) == 0,
        data["task"][:, 0] if "task" in data.keys() else None,
    )


class Networks:
    """World model, actor and critics, and the actor loss over them."""

    def __init__(self, tasks: bool = False, dtype: torch.dtype = torch.float32, **kwargs: object) -> None:
        self.model = world_model(tasks, dtype, **kwargs)
        self.actor = randomized(Actor(D, A, [10]).to(dtype), seed=1)
        self.critics = randomized(CriticEnsemble(D, [10]).to(dtype), seed=2)
        self.tasks = tasks

    def loss(self, **kwargs: object) -> PWMActorLoss:
        mask = self.model.task.action_mask if self.tasks else None
        return PWMActorLoss(
            actor_module(self.actor),
            world_model_module(self.model, task="task" if self.tasks else None),
            value_module(self.critics),
            **{"horizon": H, "action_mask": mask, **kwargs},
        )

    def start(self, batch: int = B) -> TensorDict:
        dtype = next(self.model.parameters()).dtype
        z = torch.randn(batch, D // 8, 8, dtype=dtype).softmax(-1).flatten(-2)
        data = TensorDict(latent=z, batch_size=[batch])
        if self.tasks:
            data["task"] = torch.arange(batch) % TASKS
        return data


def no_gradients(*modules: nn.Module) -> bool:
    return all(p.grad is None for m in modules for p in m.parameters())


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))
