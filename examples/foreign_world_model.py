"""PWMActorLoss in a world model that is not ours: plain MLPs in a TorchRL WorldModel, trained by TorchRL's own loss.

    python examples/foreign_world_model.py --iterations 40 --seed 0

Every iteration collects an episode from eight pendulums, fits encoder, dynamics, reward head and decoder to all data so
far with :class:`~torchrl.objectives.WorldModelLoss`, and improves the policy through imagined rollouts. Of this package
there are the two losses of policy and value, their networks, and the environment's interface.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from torchrl.modules import MLP, WorldModel
from torchrl.objectives import WorldModelLoss

from pwm_torchrl.envs import make_env
from pwm_torchrl.modules import Actor, CriticEnsemble, actor_module, value_module
from pwm_torchrl.objectives import PWMActorLoss, PWMValueLoss
from pwm_torchrl.terminal import say
from pwm_torchrl.training.evaluation import play
from pwm_torchrl.training.run import quiet_torchrl

PENDULUM = {
    "_target_": "pwm_torchrl.envs.make_gymnasium_env", "name": "pendulum", "id": "Pendulum-v1", "episode_length": 200
}  # fmt: skip
OBSERVATION, ACTION, LATENT = 3, 1, 16
REWARD_SCALE = 0.1  # rewards lie between -16 and 0


class Residual(nn.Module):
    """z' = z + MLP(z, a)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(LATENT + ACTION, LATENT)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return latent + self.net(torch.cat([latent, action], -1))


def mlp(inputs: int, outputs: int) -> MLP:
    """Two hidden layers of 128."""
    return MLP(in_features=inputs, out_features=outputs, num_cells=[128, 128], activation_class=nn.SiLU)


def make_world_model() -> WorldModel:
    """TorchRL's composition of MLPs, with the keys that PWMActorLoss reads by default."""
    following = ("next", "latent")
    return WorldModel(
        TensorDictModule(mlp(OBSERVATION, LATENT), ["observation"], ["latent"]),
        TensorDictModule(Residual(), ["latent", "action"], [following]),
        TensorDictModule(mlp(LATENT + ACTION, 1), ["latent", "action"], [("next", "reward")]),
        done_head=TensorDictModule(
            lambda z: torch.zeros_like(z[..., :1], dtype=torch.bool), [following], [("next", "terminated")]
        ),
        # Of the predicted latent: what the dynamics lose of the observation costs as well.
        decoder=TensorDictModule(mlp(LATENT, OBSERVATION), [following], ["reconstructed_observation"]),
    )


class Learner:
    """Networks, losses and optimizers."""

    def __init__(self, horizon: int) -> None:
        self.model = make_world_model()
        self.actor = actor_module(Actor(LATENT, ACTION, [128, 64]), action_spec=Bounded(-1.0, 1.0, (ACTION,)))
        critics = CriticEnsemble(LATENT, [128, 64])
        self.policy = TensorDictSequential(self.model.encoder, self.actor)
        self.model_loss = WorldModelLoss(self.model, losses=["reward", "latent", "reconstruction"])
        self.model_loss.set_keys(
            predicted_latent=("next", "latent"),
            target_latent="target_latent",
            observation=("next", "observation"),
        )
        # The same modules without the decoder, which imagination has no use for.
        model = WorldModel(
            self.model.encoder, self.model.dynamics, self.model.reward_head, done_head=self.model.done_head
        )
        self.policy_loss = PWMActorLoss(
            self.actor, model.step_module, value_module(critics), horizon=horizon, normalize_returns=True
        )
        self.value_loss = PWMValueLoss(critics)
        self.model_optimizer = torch.optim.Adam(self.model_loss.parameters(), lr=1e-3)
        self.policy_optimizer = torch.optim.Adam(self.policy_loss.parameters(), lr=5e-4)
        self.value_optimizer = torch.optim.Adam(self.value_loss.parameters(), lr=5e-4)

    def fit_model(self, batch: TensorDictBase) -> dict[str, float]:
        """One step of TorchRL's loss on transitions ``[B]``; the latent to predict carries no gradient."""
        with torch.no_grad():
            following = self.model.encode(batch["next"].select("observation"))
        losses = self.model_loss(batch.set("target_latent", following["latent"]))
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.model_optimizer.step()
        self.model_optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    def improve_policy(self, batch: TensorDictBase) -> float:
        """One step of the policy through rollouts from observations ``[B]``, and passes of the critics over them."""
        with torch.no_grad():
            start = self.model.encode(batch.select("observation"))
        metrics, rollout = self.policy_loss.backward(start)
        nn.utils.clip_grad_norm_(self.policy_loss.parameters(), 1.0)
        self.policy_optimizer.step()
        self.policy_optimizer.zero_grad()
        for part in rollout.reshape(-1)[torch.randperm(rollout.numel())].chunk(4):
            self.value_loss.backward(part)
            self.value_optimizer.step()
            self.value_optimizer.zero_grad()
        return metrics["imagined_reward"].item()


@torch.no_grad()
def collect(env: EnvBase, state: TensorDictBase, policy: TensorDictSequential | None, steps: int) -> tuple:
    """Transitions ``[steps · N]`` of the policy, or of random actions, and the state after them."""
    rows = []
    with set_exploration_type(ExplorationType.RANDOM):
        for _ in range(steps):
            state = env.rand_action(state) if policy is None else policy(state)
            step, state = env.step_and_maybe_reset(state)
            rows.append(step.select("observation", "action", ("next", "observation"), ("next", "reward")))
    data = torch.cat(rows)
    data["next", "reward"] *= REWARD_SCALE
    return data, state


def train(learner: Learner, env: EnvBase, options: argparse.Namespace) -> None:
    """Alternate between collecting, fitting the model and improving the policy in it."""
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    data, state = collect(env, env.reset(), None, options.steps)
    replay.extend(data)
    for _ in range(options.model_updates * 5):
        learner.fit_model(replay.sample(128))
    for iteration in range(1, options.iterations + 1):
        data, state = collect(env, state, learner.policy, options.steps)
        replay.extend(data)
        for _ in range(options.model_updates):
            losses = learner.fit_model(replay.sample(128))
        for _ in range(options.policy_updates):
            reward = learner.improve_policy(replay.sample(64))
        if iteration % max(1, options.iterations // 10) == 0:
            text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            say(f"iteration {iteration}: imagined reward per step {reward / REWARD_SCALE:.2f}, {text}")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Train, compare and say so; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="collected in each of 8 environments per iteration")
    parser.add_argument("--horizon", type=int, default=16, help="of imagined rollouts")
    parser.add_argument("--model-updates", type=int, default=100, help="per iteration")
    parser.add_argument("--policy-updates", type=int, default=20, help="per iteration")
    parser.add_argument("--episodes", type=int, default=32, help="of each evaluation")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    quiet_torchrl()
    torch.manual_seed(options.seed)
    started = time.monotonic()
    env = make_env(PENDULUM, num_envs=8, seed=options.seed)
    unseen = make_env(PENDULUM, num_envs=options.episodes, seed=1000)
    learner = Learner(options.horizon)
    before = play(unseen, learner.policy, 1000).returns
    train(learner, env, options)
    after = play(unseen, learner.policy, 1000).returns
    env.close()
    unseen.close()
    result: dict[str, object] = {
        "example": "foreign_world_model",
        "iterations": options.iterations,
        "seed": options.seed,
    }
    for name, returns in (("before", before), ("after", after)):
        result |= {name: returns.mean().item(), f"{name}_std": returns.std(unbiased=False).item()}
    result |= {"episodes": options.episodes, "minutes": (time.monotonic() - started) / 60}
    say("before: return {before:.0f} ± {before_std:.0f}, after: return {after:.0f} ± {after_std:.0f}".format(**result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
