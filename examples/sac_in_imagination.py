"""TorchRL's SAC on imagined and real transitions (MBPO-style), in a world model that is learned on the way.

    python examples/sac_in_imagination.py --iterations 80

Every iteration collects 16 steps in each of 8 environments, trains the world model on slices of all real data, imagines
short rollouts that branch off from replayed states, and updates SAC on batches of which one part is imagined and the
other real. Policy and critics act on latents: real data are stored as observations and encoded when they are drawn, by
the encoder of this iteration's imagination, so that both parts of a batch speak one language.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from pwm_torchrl.choices import sizes
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.envs import LatentImaginationEnv, env_info, make_env
from pwm_torchrl.modules import WorldModel, WorldModelSpec, encoder_module, make_world_model
from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.run.collector import ResumableCollector, evaluation_env_seed, seed_everything, training_env_seed
from pwm_torchrl.run.evaluation import play
from pwm_torchrl.terminal import say

ENV = {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "id": "Pendulum-v1", "episode_length": 200}
NUM_ENVS, COLLECT_STEPS, GAMMA, REWARD_SCALE = 8, 16, 0.99, 0.1
MODEL_HORIZON, MODEL_BATCH, MODEL_UPDATES, FIRST_MODEL_UPDATES = 8, 128, 6, 100
BRANCH_LENGTH, BRANCHES = 3, 512
SAC_UPDATES, SAC_BATCH, REAL_SHARE = 48, 256, 0.5


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


def make_sac(latent_dim: int, action_spec) -> tuple[ProbabilisticActor, SACLoss]:
    """Policy, and SAC's loss with the usual settings, on latents."""
    action_dim = action_spec.shape[-1]
    network = torch.nn.Sequential(
        MLP(latent_dim, 2 * action_dim, num_cells=[128, 128], activation_class=torch.nn.Mish),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=1e-4),
    )
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["latent"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=action_spec,
        distribution_class=TanhNormal,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=False,
    )
    value = ValueOperator(
        MLP(latent_dim + action_dim, 1, num_cells=[128, 128], activation_class=torch.nn.Mish),
        in_keys=["action", "latent"],
    )
    loss = SACLoss(actor, value, num_qvalue_nets=2, loss_function="l2", delay_actor=False, delay_qvalue=True)
    loss.make_value_estimator(gamma=GAMMA)
    return actor, loss


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


@torch.no_grad()
def real_transitions(replay: TrajectoryReplay, env: LatentImaginationEnv, count: int) -> TensorDictBase:
    """Real transitions ``[count]`` in the latents of this iteration's encoder."""
    steps = replay.sample_slices(-(-count // MODEL_HORIZON)).reshape(-1)[:count]
    return TensorDict(
        latent=env.encode(steps.select("observation"))["latent"],
        action=steps["action"],
        next=TensorDict(
            latent=env.encode(steps["next"].select("observation"))["latent"],
            reward=steps["next", "reward"],
            done=steps["next", "done"],
            terminated=steps["next", "terminated"],
            batch_size=[count],
        ),
        batch_size=[count],
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and compare deterministic returns in the real environment before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20, help="real episodes of each evaluation")
    parser.add_argument("--quick", action="store_true", help="short episodes, hardly an update: does it run?")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    model_updates, first_updates, sac_updates = (
        (1, 1, 2) if options.quick else (MODEL_UPDATES, FIRST_MODEL_UPDATES, SAC_UPDATES)
    )
    seed_everything(options.seed)
    started = time.monotonic()
    cfg = {**ENV, "episode_length": 20} if options.quick else ENV
    env = make_env(cfg, num_envs=NUM_ENVS, seed=training_env_seed(options.seed))
    eval_seed = evaluation_env_seed(options.seed)
    eval_env = make_env(cfg, num_envs=options.episodes, seed=eval_seed)

    model = make_model(env)
    model_loss = PWMModelLoss(model, gamma=GAMMA)
    model_optimizer = torch.optim.Adam(model_loss.parameters(), lr=1e-3, fused=True)
    replay = TrajectoryReplay(100_000, NUM_ENVS, MODEL_HORIZON)
    imagination = LatentImaginationEnv(model, start=replay, snapshot=True, batch_size=[BRANCHES])
    actor, sac = make_sac(imagination.observation_spec["latent"].shape[-1], env.action_spec_unbatched)
    optimizer = torch.optim.Adam(sac.parameters(), lr=1e-3, fused=True)
    target = SoftUpdate(sac, tau=0.01)
    policy = TensorDictSequential(encoder_module(imagination.stepped_model), actor)  # acts as it is trained

    before = play(eval_env, policy, eval_seed).returns
    collector = ResumableCollector(env, policy, COLLECT_STEPS)
    for iteration, batch in zip(range(options.iterations), collector, strict=False):
        replay.extend(batch.set(("next", "reward"), REWARD_SCALE * batch["next", "reward"]))
        train_model(model_loss, model_optimizer, replay, model_updates if iteration else first_updates, MODEL_BATCH)
        imagination.update_snapshot()
        with torch.no_grad():
            imagined = imagination.rollout(BRANCH_LENGTH, actor, break_when_any_done=False).reshape(-1)
        real_count = int(REAL_SHARE * SAC_BATCH)
        for _ in range(sac_updates):
            rows = torch.randint(len(imagined), (SAC_BATCH - real_count,))
            real = real_transitions(replay, imagination, real_count)
            part = imagined[rows].select(*real.keys(True, True))
            terms = sac(torch.cat([part, real]))
            (terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()
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
