"""Baseline: TorchRL's SAC on the same environments, collector, evaluation and budget as a PWM run.

    python benchmarks/sac.py env=cartpole_swingup seed=0 run_dir=runs/sac

Takes the configuration of ``launch/train.py``: environment, seed, epochs (times horizon times environments are the
agent steps) and random steps. One gradient update per agent step, batch 256, two hidden layers of 256, learnt
temperature; an interrupted run starts again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import torch
from tensordict.nn import InteractionType, TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.config import Config
from pwm_torchrl.data.replay import STORED_KEYS
from pwm_torchrl.devices import set_threads
from pwm_torchrl.envs import env_info, make_env
from pwm_torchrl.run.collector import (
    EpisodeReturns,
    ResumableCollector,
    evaluation_env_seed,
    seed_everything,
    training_env_seed,
)
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.run.evaluation import play, random_action
from pwm_torchrl.run.metrics import CsvMetrics
from pwm_torchrl.run.summary import RunSummary

BATCH = 256
WIDTHS = [256, 256]
LEARNING_RATE = 3e-4


def build(observation_dim: int, action_dim: int, spec) -> tuple[ProbabilisticActor, SACLoss]:
    """Policy and loss with the usual settings."""
    policy = torch.nn.Sequential(
        MLP(in_features=observation_dim, out_features=2 * action_dim, num_cells=WIDTHS, activation_class=torch.nn.ReLU),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=1e-4),
    )
    actor = ProbabilisticActor(
        TensorDictModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=False,
    )
    value = ValueOperator(
        MLP(in_features=observation_dim + action_dim, out_features=1, num_cells=WIDTHS, activation_class=torch.nn.ReLU),
        in_keys=["action", "observation"],
    )
    loss = SACLoss(actor, value, num_qvalue_nets=2, loss_function="l2", delay_actor=False, delay_qvalue=True)
    loss.make_value_estimator(gamma=0.99)
    return actor, loss


def run(cfg: Config, run_dir: Path) -> None:
    """Train, evaluate on schedule, write metrics and summary like a PWM run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    cfg = replace(cfg, model=replace(cfg.model, name="sac"))
    save_config(cfg, run_dir)
    summary = RunSummary.start(cfg, run_dir, resume=False)
    (run_dir / "metrics.csv").unlink(missing_ok=True)
    set_threads(cfg.training.threads)
    seed_everything(cfg.seed)
    env = make_env(cfg.env, num_envs=cfg.env["num_envs"], seed=training_env_seed(cfg.seed))
    info = env_info(env)
    seed = evaluation_env_seed(cfg.seed)
    eval_env = make_env(cfg.env, num_envs=cfg.training.eval_episodes, seed=seed)
    actor, loss = build(info.observation_dim, info.action_dim, env.action_spec_unbatched)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, fused=True)
    target = SoftUpdate(loss, tau=0.005)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(cfg.training.replay_capacity), batch_size=BATCH)
    collector = ResumableCollector(env, actor, cfg.algorithm.steps_per_env, cfg.algorithm.random_steps)
    returns = EpisodeReturns(info.num_envs)
    csv = CsvMetrics(run_dir / "metrics.csv")
    summary.random_return = play(eval_env, random_action(eval_env), seed).returns.mean().item()
    batches = iter(collector)
    for epoch in range(1, cfg.training.epochs + 1):
        batch = next(batches)
        finished = returns.update(batch)
        replay.extend(batch.select(*STORED_KEYS).reshape(-1))
        summary.epochs_done = epoch
        summary.agent_steps += batch.numel()
        summary.env_steps = summary.agent_steps * info.action_repeat
        if summary.agent_steps >= max(BATCH, cfg.algorithm.random_steps):
            for _ in range(batch.numel()):
                terms = loss(replay.sample())
                (terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                target.step()
        row = {"epoch": epoch, "agent_steps": summary.agent_steps, "env_steps": summary.env_steps}
        row["wall_clock_s"] = round(summary.wall_clock_s, 3)
        if len(finished):
            row["train/return"] = finished.mean().item()
        if epoch % cfg.training.eval_every == 0 or epoch == cfg.training.epochs:
            scores = play(eval_env, actor, seed).returns
            summary.evaluated(scores.mean().item(), scores.std(unbiased=False).item())
            row |= {"eval/return_mean": summary.final_return, "eval/return_std": summary.final_return_std}
            summary.write()
            print(f"epoch {epoch}/{cfg.training.epochs}  return {summary.final_return:.1f}", flush=True)
        csv.write(row)
    csv.close()
    summary.finish("finished")


if __name__ == "__main__":
    config = compose(sys.argv[1:])
    run(config, Path(config.run_dir or "runs/sac"))
