"""TorchRL's PPO on imagined rollouts only, in a world model that is learned from what its policy meets.

    python examples/ppo_in_imagination.py --iterations 100

Every iteration collects 16 steps in each of 8 environments, trains the world model on slices of all real data, imagines
rollouts from replayed states, and makes PPO's passes over them. The policy never learns from a real transition; it acts
on latents, in the real environment on those of the encoder that this iteration's imagination has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from pwm_torchrl.choices import sizes
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.envs import LatentImaginationEnv, env_info, make_env
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    WorldModelSpec,
    encoder_module,
    make_world_model,
    value_module,
)
from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.run.collector import ResumableCollector, evaluation_env_seed, seed_everything, training_env_seed
from pwm_torchrl.run.evaluation import play
from pwm_torchrl.terminal import say

ENV = {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "id": "Pendulum-v1", "episode_length": 200}
NUM_ENVS, COLLECT_STEPS, GAMMA, LAMBDA, REWARD_SCALE = 8, 16, 0.9, 0.95, 0.1
MODEL_HORIZON, MODEL_BATCH, MODEL_UPDATES, FIRST_MODEL_UPDATES = 10, 128, 8, 200
ROLLOUTS, ROLLOUT_LENGTH = 1024, 10
PPO_PASSES, PPO_BATCH, MAX_KL = 6, 1024, 0.03


def make_model(env: EnvBase) -> WorldModel:
    """A small world model with the residual dynamics."""
    info, size = env_info(env), sizes()["tiny"]
    return make_world_model(
        WorldModelSpec(
            info.observation_dim,
            info.action_dim,
            size.latent_dim,
            size.units,
            size.encoder_units,
            dynamics={"kind": "residual"},
        )
    )


def make_ppo(latent_dim: int, action_spec) -> tuple[ProbabilisticActor, ClipPPOLoss, GAE]:
    """Policy, and PPO's loss and advantages, on latents."""
    size = sizes()["tiny"]
    network = Actor(latent_dim, action_spec.shape[-1], size.actor_units, log_std_init=0.0, log_std_min=-1.0)
    with torch.no_grad():
        network.net[-1].weight.mul_(0.01)  # the first actions are noise around 0, from where PPO can go anywhere
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["latent"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=action_spec,
        distribution_class=TanhNormal,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,  # TorchRL's default is the mode, from which nothing is learned
    )
    value = value_module(CriticEnsemble(latent_dim, size.critic_units, num_critics=1))
    loss = ClipPPOLoss(actor, value, clip_epsilon=0.2, entropy_bonus=False, normalize_advantage=True)
    return actor, loss, GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=value)


def train_model(
    loss: PWMModelLoss, optimizer: torch.optim.Optimizer, replay: TrajectoryReplay, updates: int, batch: int
) -> None:
    """Updates of the world model on slices of real data."""
    for _ in range(updates):
        terms = loss(replay.sample_slices(batch))
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 20.0)
        optimizer.step()
        optimizer.zero_grad()


def train_policy(
    loss: ClipPPOLoss, optimizer: torch.optim.Optimizer, rollouts: TensorDictBase, passes: int, batch: int
) -> None:
    """PPO passes over imagined transitions ``[N]``, while the policy stays close to the one that imagined them."""
    for _ in range(passes):
        for rows in torch.randperm(len(rollouts)).split(batch):
            terms = loss(rollouts[rows])
            if terms["kl_approx"] > MAX_KL:
                return
            (terms["loss_objective"] + terms["loss_critic"]).backward()
            for part in (loss.actor_network_params, loss.critic_network_params):
                torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and compare deterministic returns in the real environment before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20, help="real episodes of each evaluation")
    parser.add_argument("--quick", action="store_true", help="short episodes, hardly an update: does it run?")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    updates, first_updates, passes = (1, 1, 1) if options.quick else (MODEL_UPDATES, FIRST_MODEL_UPDATES, PPO_PASSES)
    seed_everything(options.seed)
    started = time.monotonic()
    cfg = {**ENV, "episode_length": 20} if options.quick else ENV
    env = make_env(cfg, num_envs=NUM_ENVS, seed=training_env_seed(options.seed))
    eval_seed = evaluation_env_seed(options.seed)
    eval_env = make_env(cfg, num_envs=options.episodes, seed=eval_seed)

    model = make_model(env)
    model_loss = PWMModelLoss(model, gamma=0.99)
    model_optimizer = torch.optim.Adam(model_loss.parameters(), lr=1e-3, fused=True)
    replay = TrajectoryReplay(100_000, NUM_ENVS, MODEL_HORIZON)
    imagination = LatentImaginationEnv(
        model, start=replay, horizon=ROLLOUT_LENGTH, snapshot=True, batch_size=[ROLLOUTS]
    )
    actor, ppo, advantage = make_ppo(imagination.observation_spec["latent"].shape[-1], env.action_spec_unbatched)
    optimizer = torch.optim.Adam(ppo.parameters(), lr=3e-4, fused=True)
    policy = TensorDictSequential(encoder_module(imagination.stepped_model), actor)  # acts as it is trained

    before = play(eval_env, policy, eval_seed).returns
    collector = ResumableCollector(env, policy, COLLECT_STEPS)
    for iteration, batch in zip(range(options.iterations), collector, strict=False):
        replay.extend(batch)
        train_model(model_loss, model_optimizer, replay, updates if iteration else first_updates, MODEL_BATCH)
        imagination.update_snapshot()
        with torch.no_grad():
            imagined = imagination.rollout(ROLLOUT_LENGTH, actor)
            # The model learns raw rewards, which shape its latents; values are easier to learn from smaller ones.
            imagined["next", "reward"] *= REWARD_SCALE
            advantage(imagined)
        train_policy(ppo, optimizer, imagined.reshape(-1), passes, PPO_BATCH)
        if (iteration + 1) % 10 == 0:
            returns = play(eval_env, policy, eval_seed).returns
            say(f"iteration {iteration + 1}/{options.iterations}  return {returns.mean():.1f}")
    collector.shutdown()
    after = play(eval_env, policy, eval_seed).returns

    result = {
        "before": before.mean().item(),
        "before_std": before.std(unbiased=False).item(),
        "after": after.mean().item(),
        "after_std": after.std(unbiased=False).item(),
        "agent_steps": replay.collected,
        "minutes": (time.monotonic() - started) / 60,
        "cpu_minutes": time.process_time() / 60,
    }
    say("before: return {before:.1f} ± {before_std:.1f}, after: return {after:.1f} ± {after_std:.1f}".format(**result))
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({**settings, **result}, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
