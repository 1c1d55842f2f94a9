"""Models whose best actions are known, and planners in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, ModelBasedEnvBase

from pwm_torchrl.envs import PolicySeededMPPI

D = 2
#: Linear dynamics z' = A z + B a and costs zᵀz + R a².
A, B, R, GAMMA = torch.tensor([[1.0, 0.3], [0.0, 0.9]]), torch.tensor([[0.0], [0.5]]), 0.1, 0.95


def riccati() -> tuple[Tensor, Tensor]:
    """P and K of the best policy a = −K z, whose value is −zᵀ P z."""
    p = torch.eye(D)
    for _ in range(500):
        gain = GAMMA * torch.linalg.solve(R + GAMMA * B.T @ p @ B, B.T @ p @ A)
        p = torch.eye(D) + R * gain.T @ gain + GAMMA * (A - B @ gain).T @ p @ (A - B @ gain)
    return p, gain


P, K = riccati()


class Model(ModelBasedEnvBase):
    """A function of tensors as a model: latent ``[..., 2]``, one action, ends when it says so."""

    def __init__(self, step: Any = None, low: float = -1.0, high: float = 1.0, batch: tuple[int, ...] = ()) -> None:
        module = TensorDictModule(step or linear, ["latent", "action"], ["latent", "reward", "terminated", "done"])
        super().__init__(module, batch_size=torch.Size(batch))
        self.observation_spec = Composite(latent=Unbounded((*batch, D)), shape=batch)
        self.action_spec = Bounded(low, high, (*batch, 1))
        self.reward_spec = Unbounded((*batch, 1))

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        shape = self.batch_size if tensordict is None else tensordict.shape
        return TensorDict(latent=torch.randn(*shape, D), batch_size=shape)


def never(like: Tensor) -> Tensor:
    return torch.zeros(*like.shape[:-1], 1, dtype=torch.bool)


def linear(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    cost = z.square().sum(-1, keepdim=True) + R * a.square()
    return z @ A.T + a @ B.T, -cost, never(z), never(z)


def module(function: Any, out: str) -> TensorDictModule:
    return TensorDictModule(function, ["latent"], [out])


ZERO = module(lambda z: 0 * z[..., :1], "action")
NOTHING = module(lambda z: 0 * z[..., :1], "state_value")
BEST_VALUE = module(lambda z: -torch.einsum("...i,ij,...j->...", z, P, z).unsqueeze(-1), "state_value")
BEST_POLICY = module(lambda z: -z @ K.T, "action")


def planner(env: EnvBase | None = None, policy: Any = ZERO, value: Any = NOTHING, **changes: Any) -> PolicySeededMPPI:
    arguments = {"num_candidates": 128, "num_policy_candidates": 4, "top_k": 16, "gamma": GAMMA, "warm_start": False}
    return PolicySeededMPPI(Model() if env is None else env, policy, value, **(arguments | changes))


def state(*rows: tuple[float, float], **entries: Tensor) -> TensorDict:
    return TensorDict(latent=torch.tensor(rows), **entries, batch_size=[len(rows)])


STATES = state((0.4, -0.2), (-0.5, 0.3), (0.1, 0.4))


def seen(plan: PolicySeededMPPI, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Candidates of every round."""
    rounds: list[Tensor] = []
    returns = plan.candidate_returns
    monkeypatch.setattr(plan, "candidate_returns", lambda s, c: (rounds.append(c), returns(s, c))[1])
    return rounds
