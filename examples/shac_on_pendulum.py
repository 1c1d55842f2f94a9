"""Short-horizon actor-critic: PWMActorLoss through TorchRL's differentiable pendulum instead of a world model.

    python examples/shac_on_pendulum.py --iterations 400 --seed 0

:class:`~pwm_torchrl.objectives.PWMActorLoss` back-propagates through whatever makes a step from a state and an action.
With the equations of motion in place of a learned model it is SHAC (https://arxiv.org/abs/2204.07137): 64 pendulums
advance by short rollouts, each of which ends in the critic's value and starts where the last one ended.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import PendulumEnv

from pwm_torchrl.modules import Actor, CriticEnsemble, actor_module, value_module
from pwm_torchrl.objectives import PWMActorLoss, PWMValueLoss
from pwm_torchrl.terminal import say

EPISODE = 200
SPEED = 8.0  # the largest angular velocity, by which the state's is divided


class Pendulum(nn.Module):
    """TorchRL's stateless ``PendulumEnv`` as a function of tensors.

    The state is ``[B, 3]``: cosine and sine of the angle and the angular velocity; actions are in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.env = PendulumEnv()
        self.params = PendulumEnv.gen_params()["params"]

    def reset(self, count: int) -> Tensor:
        """States of ``count`` new episodes."""
        start = self.env.reset(PendulumEnv.gen_params(batch_size=[count]), set_state=False)
        return self.state(start["th"], start["thdot"])

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, reward and whether the episode terminated, which it never does."""
        angle, speed = torch.atan2(state[:, 1], state[:, 0]), SPEED * state[:, 2]
        torque = self.params["max_torque"] * action
        params = self.params.expand(len(state))
        data = TensorDict(th=angle, thdot=speed, action=torque, params=params, batch_size=[len(state)])
        after = self.env.step(data)["next"]
        return self.state(after["th"], after["thdot"]), after["reward"], after["terminated"]

    @staticmethod
    def state(angle: Tensor, speed: Tensor) -> Tensor:
        """State of angle and angular velocity, both ``[B]``."""
        return torch.stack([angle.cos(), angle.sin(), speed / SPEED], -1)


@torch.no_grad()
def evaluate(pendulum: Pendulum, actor: Actor, episodes: int) -> Tensor:
    """Returns of deterministic episodes in the environment, the same starts every time."""
    pendulum.env.set_seed(1000)
    state, total = pendulum.reset(episodes), torch.zeros(episodes, 1)
    for _ in range(EPISODE):
        state, reward, _ = pendulum(state, actor.act(state))
        total += reward
    return total


def train(pendulum: Pendulum, actor: Actor, critics: CriticEnsemble, options: argparse.Namespace) -> None:
    """Alternate between a rollout that improves the policy and passes over it that fit the critics."""
    step = TensorDictModule(
        pendulum, ["latent", "action"], [("next", name) for name in ("latent", "reward", "terminated")]
    )
    policy_loss = PWMActorLoss(
        actor_module(actor),
        step,
        value_module(critics),
        horizon=options.horizon,
        detach=False,  # SHAC's choice: the policy also learns where its actions lead it
        normalize_returns=True,
    )
    value_loss = PWMValueLoss(critics)
    policy_optimizer = torch.optim.Adam(policy_loss.parameters(), lr=2e-3)
    value_optimizer = torch.optim.Adam(value_loss.parameters(), lr=1e-3)
    state, age = pendulum.reset(options.envs), torch.randint(EPISODE, (options.envs,))
    for iteration in range(1, options.iterations + 1):
        metrics, rollout = policy_loss.backward(TensorDict(latent=state, batch_size=[len(state)]))
        nn.utils.clip_grad_norm_(policy_loss.parameters(), 1.0)
        policy_optimizer.step()
        policy_optimizer.zero_grad()
        for _ in range(options.critic_passes):
            for part in rollout.reshape(-1)[torch.randperm(rollout.numel())].chunk(4):
                value_loss.backward(part)
                value_optimizer.step()
                value_optimizer.zero_grad()
        age += options.horizon - 1
        fresh = (age >= EPISODE).unsqueeze(-1)
        state = torch.where(fresh, pendulum.reset(len(state)), rollout["latent"][:, -1])
        age = age.where(age < EPISODE, 0)
        if iteration % max(1, options.iterations // 10) == 0:
            say(f"iteration {iteration}: reward per step {metrics['imagined_reward']:.2f}")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Train, compare and say so; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=400, help="policy updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--horizon", type=int, default=16, help="steps that a gradient goes back")
    parser.add_argument("--envs", type=int, default=64, help="pendulums side by side")
    parser.add_argument("--critic-passes", type=int, default=4, help="over every rollout")
    parser.add_argument("--episodes", type=int, default=64, help="of each evaluation")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    pendulum, actor, critics = Pendulum(), Actor(3, 1, [64, 64]), CriticEnsemble(3, [64, 64])
    before = evaluate(pendulum, actor, options.episodes)
    pendulum.env.set_seed(options.seed)
    train(pendulum, actor, critics, options)
    after = evaluate(pendulum, actor, options.episodes)
    result: dict[str, object] = {"example": "shac_on_pendulum", "iterations": options.iterations, "seed": options.seed}
    for name, returns in (("before", before), ("after", after)):
        result |= {name: returns.mean().item(), f"{name}_std": returns.std(unbiased=False).item()}
    result |= {"episodes": options.episodes, "minutes": (time.monotonic() - started) / 60}
    say("before: return {before:.0f} ± {before_std:.0f}, after: return {after:.0f} ± {after_std:.0f}".format(**result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
