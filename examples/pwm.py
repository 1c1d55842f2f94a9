"""PWM in one file: TorchRL's collector and replay, and three losses; the one to copy and change.

    python examples/pwm.py --seed 0

Every iteration (1) takes 16 steps in each of 8 pendulums, (2) fits a latent world model to slices of everything seen so
far, and (3) improves the policy by back-propagating through rollouts that the model imagines, at whose end critics say
what comes after. PWM is described in https://arxiv.org/abs/2407.02466.

Two to three minutes on one CPU core; seeds 0, 1 and 2 end at a return of -150, -171 and -122 (random actions: -1200).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pwm_torchrl.envs import make_gymnasium_env
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModelSpec,
    actor_module,
    make_world_model,
    policy_module,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss

ENV, EPISODE_STEPS, NUM_ENVS, EVAL_ENVS = "Pendulum-v1", 200, 8, 50
ITERATIONS, LATENT_DIM, HORIZON, GAMMA = 110, 64, 16, 0.99
MODEL_BATCH, FIRST_MODEL_UPDATES, MODEL_UPDATES = 64, 500, 8  # slices; updates in the first iteration and in the others
POLICY_BATCH, POLICY_UPDATES, CRITIC_PASSES, CRITIC_MINIBATCHES = 128, 3, 3, 4  # rollouts; passes over their states


class Learner:
    """Adam with a limit on the gradient's norm; the learning rate falls linearly to zero over all iterations."""

    def __init__(self, network: nn.Module, lr: float, max_norm: float, betas: tuple = (0.9, 0.999)) -> None:
        self.parameters, self.max_norm = list(network.parameters()), max_norm
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=betas)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=ITERATIONS)

    def step(self, loss: Tensor) -> None:
        """One update."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()


@torch.no_grad()
def evaluate(env: EnvBase, policy: nn.Module) -> Tensor:
    """Return of one deterministic episode in each environment, ``[N]``."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        return env.rollout(EPISODE_STEPS, policy)["next", "reward"].sum(1).squeeze(-1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and compare returns in the real environment before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args(arguments).seed
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # tensors this small gain nothing from more

    # Environments: observations [N, 3], actions [N, 1] in [-1, 1] whatever the simulator's own range is.
    env = make_gymnasium_env(ENV, num_envs=NUM_ENVS, seed=10_000 * seed)
    eval_env = make_gymnasium_env(ENV, num_envs=EVAL_ENVS, seed=10_000 * seed + 5_000)
    observation_dim, action_dim = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]

    # Networks: a world model of latents z = h(o) with dynamics z' = d(z, a) and a reward; policy and critics act on z.
    spec = WorldModelSpec(observation_dim, action_dim, LATENT_DIM, [128, 128], [128], dynamics={"kind": "mlp"})
    world_model = make_world_model(spec)
    actor, critics = Actor(LATENT_DIM, action_dim, [128, 64]), CriticEnsemble(LATENT_DIM, [128, 64])
    policy = policy_module(world_model, actor, action_spec=env.action_spec_unbatched)

    # Losses: each reads a TensorDict and returns one, and trains one of the three networks.
    model_loss = PWMModelLoss(world_model, rho=0.5)  # errors t steps ahead count 0.5^t
    actor_loss = PWMActorLoss(
        actor_module(actor),
        world_model_module(world_model),
        value_module(critics),
        horizon=HORIZON,
        gamma=GAMMA,
        normalize_returns=True,
        entropy_weight=0.003,  # keeps actions from saturating
    )
    value_loss = PWMValueLoss(critics)
    model_learner = Learner(world_model, 1e-3, 20.0)
    actor_learner = Learner(actor, 5e-4, 1.0, betas=(0.7, 0.95))
    critic_learner = Learner(critics, 5e-4, 100.0, betas=(0.7, 0.95))

    # Data: a storage [time, env], from which slices are drawn that do not cross the end of an episode.
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100_000, ndim=2),
        sampler=SliceSampler(slice_len=HORIZON, end_key=("next", "done")),
        batch_size=MODEL_BATCH * HORIZON,
        dim_extend=1,
    )
    replay.extend(env.rollout(EPISODE_STEPS))  # an episode of random actions in each environment
    collector = Collector(
        env,
        policy,
        frames_per_batch=NUM_ENVS * HORIZON,
        total_frames=NUM_ENVS * HORIZON * ITERATIONS,
        auto_register_policy_transforms=False,  # none: the policy has no memory
    )

    before = evaluate(eval_env, policy)
    for iteration, batch in enumerate(collector):
        replay.extend(batch.select("observation", "action", "next"))

        for _ in range(MODEL_UPDATES if iteration else FIRST_MODEL_UPDATES):
            slices = replay.sample().reshape(MODEL_BATCH, HORIZON)
            model_learner.step(sum(model_loss(slices).values()))

        for _ in range(POLICY_UPDATES):
            observation = replay.sample()["observation"][torch.randperm(MODEL_BATCH * HORIZON)[:POLICY_BATCH]]
            start = TensorDict(latent=world_model.encode(observation).detach(), batch_size=[POLICY_BATCH])
            losses, rollouts = actor_loss.rollout_and_loss(start)
            actor_learner.step(losses["loss_actor"])
            states = rollouts.flatten()  # with their TD(lambda) targets
            for _ in range(CRITIC_PASSES):
                for rows in torch.randperm(len(states)).chunk(CRITIC_MINIBATCHES):
                    critic_learner.step(value_loss(states[rows])["loss_value"])

        for learner in (model_learner, actor_learner, critic_learner):
            learner.schedule.step()
        if (iteration + 1) % 10 == 0:
            print(f"iteration {iteration + 1}/{ITERATIONS}  return {evaluate(eval_env, policy).mean():.1f}")

    after = evaluate(eval_env, policy)
    print(f"return {before.mean():.1f} ± {before.std():.1f} before, {after.mean():.1f} ± {after.std():.1f} after")
    return {"before": before.mean().item(), "after": after.mean().item()}


if __name__ == "__main__":
    main()
