"""Latent dynamics of this package inside TorchRL's own WorldModel, trained by TorchRL's own WorldModelLoss.

Any dynamics of :func:`~pwm_torchrl.modules.make_dynamics` is a module of ``latent`` and ``action``; here a flow.
TorchRL's loss compares the latent that the dynamics predict with one that the data bring: that of the next observation,
encoded without gradient. The decoder keeps the encoder from mapping all observations to one latent.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import MLP, WorldModel
from torchrl.objectives import WorldModelLoss

from pwm_torchrl.modules import Encoder, ScalarRewardHead, make_dynamics

OBSERVATION, ACTION, LATENT = 3, 1, 32


def make_loss() -> WorldModelLoss:
    """TorchRL's loss around TorchRL's world model with parts of this package."""
    reward = ScalarRewardHead(LATENT + ACTION, [64])
    world_model = WorldModel(
        TensorDictModule(Encoder(OBSERVATION, 0, [64], LATENT), ["observation"], ["latent"]),
        TensorDictModule(
            make_dynamics("flow", LATENT, ACTION, 0, [64], substeps=2), ["latent", "action"], [("next", "latent")]
        ),
        TensorDictModule(reward, ["latent", "action"], [("next", "reward")]),
        decoder=TensorDictModule(
            MLP(in_features=LATENT, out_features=OBSERVATION, num_cells=[64]), ["latent"], ["reconstructed_observation"]
        ),
    )
    loss = WorldModelLoss(world_model, losses=["reward", "latent", "reconstruction"])
    loss.set_keys(predicted_latent=("next", "latent"), target_latent="target_latent")
    return loss


def update(loss: WorldModelLoss, optimizer: torch.optim.Optimizer, batch: TensorDict) -> dict[str, float]:
    """One step on transitions ``[B]``."""
    with torch.no_grad():
        following = loss.world_model.encode(batch["next"].select("observation"))
    losses = loss(batch.set("target_latent", following["latent"]))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def turning(batch: int) -> TensorDict:
    """Made-up data: a point turns on a circle as its action says, and is rewarded for being on the right."""
    angle, action = torch.rand(batch) * 2 * torch.pi, torch.rand(batch, ACTION) * 2 - 1

    def observe(angle: torch.Tensor) -> torch.Tensor:
        return torch.stack([angle.cos(), angle.sin(), torch.ones_like(angle)], -1)

    following = TensorDict(
        observation=observe(angle + 0.5 * action.squeeze(-1)), reward=angle.cos().unsqueeze(-1), batch_size=[batch]
    )
    return TensorDict(observation=observe(angle), action=action, next=following, batch_size=[batch])


def main(steps: int = 100) -> tuple[dict[str, float], dict[str, float]]:
    """First and last losses."""
    loss = make_loss()
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    history = [update(loss, optimizer, turning(64)) for _ in range(steps)]
    return history[0], history[-1]


if __name__ == "__main__":
    main()
