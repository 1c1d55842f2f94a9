"""What the networks of runs are worth, and what a model learns of fixed data: a row for each run or model.

    python benchmarks/model_quality.py runs/a runs/b                   # of finished runs: their policies' episodes
    python benchmarks/model_quality.py --env cheetah-run               # models fitted to random actions, no policy
    python benchmarks/model_quality.py --env pendulum algorithm=pwm_paper --models mlp residual

``--env`` names a task of the registry or a file of ``configs/env``; words with ``=`` are settings. Errors are of
rollouts without feedback, squared, over the variances of latents and rewards in the same data: 1 is as good as the
mean. The table is printed, with ``--publish`` it goes to ``benchmarks/results``; ``--json`` has every step of the
horizon. What the columns mean, and what to change: ``docs/howto/it_does_not_learn.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

import torch  # noqa: E402

from benchmarks.learning import hardware  # noqa: E402
from pwm_torchrl.algorithm.base import (  # noqa: E402
    MetricRow,
    build_parts,
    find_algorithm,
)
from pwm_torchrl.algorithm.build import Networks  # noqa: E402
from pwm_torchrl.algorithm.updates import LocalExecutor, Updates  # noqa: E402
from pwm_torchrl.cli.compose import compose  # noqa: E402
from pwm_torchrl.config import Config  # noqa: E402
from pwm_torchrl.data import TrajectoryReplay  # noqa: E402
from pwm_torchrl.envs import env_info, make_env  # noqa: E402
from pwm_torchrl.envs.factory import opened_env  # noqa: E402
from pwm_torchrl.modules import WorldModel, policy_module  # noqa: E402
from pwm_torchrl.objectives import PWMActorLoss  # noqa: E402
from pwm_torchrl.objectives.model_loss import Slices  # noqa: E402
from pwm_torchrl.run.collector import fresh_env_seed, seed_everything  # noqa: E402
from pwm_torchrl.run.evaluation import Episodes, play, random_action  # noqa: E402
from pwm_torchrl.run.load import load_networks  # noqa: E402
from pwm_torchrl.run.quality import (  # noqa: E402
    effective_rank,
    latent_variance,
    rollout_errors,
    saturated_share,
    start_dependence,
    termination_shares,
    value_quality,
)
from pwm_torchrl.run.train import quiet_torchrl  # noqa: E402

#: Starts from which gradients are followed.
STARTS = 64


def windows(episodes: Episodes, horizon: int) -> Slices:
    """Slices of ``horizon`` steps, one behind the other, that begin before their episode ends."""
    starts = range(0, len(episodes.valid), horizon)
    missing = horizon * len(starts) - len(episodes.valid)

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])  # steps that are not valid
        return torch.cat([x[s : s + horizon, episodes.valid[s].squeeze(-1)] for s in starts], 1)

    fields = (episodes.next_observation, episodes.action, episodes.reward, episodes.ends, episodes.valid)
    return Slices(cut(episodes.observation)[0], *map(cut, fields))


def errors_over_variances(
    model: WorldModel, slices: Slices, variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and reward errors of rollouts without feedback, over the variances in the same data, ``[H]`` each."""
    latent, reward = rollout_errors(
        model, slices.observation, slices.action, slices.next_observation, slices.reward, valid=slices.valid
    )
    return latent / variance, reward / slices.reward[slices.valid].var(unbiased=False)


def of_model(networks: Networks, episodes: Episodes, horizon: int, soft: bool) -> dict[str, Any]:
    """What a model knows of episodes; lists have an entry for each step of the horizon."""
    model, slices = networks.model, windows(episodes, horizon)
    latent = model.encode(slices.observation).detach()
    variance = latent_variance(latent)
    latent_nmse, reward_nmse = errors_over_variances(model, slices, variance)
    left = start_dependence(model, slices.observation[:STARTS], slices.action[:, 0])
    predicted, real = termination_shares(model, slices, soft)
    return {
        "latent_variance": variance.item(),
        "latent_rank": effective_rank(latent).item(),
        "latent_nmse": latent_nmse.tolist(),
        "reward_nmse": reward_nmse.tolist(),
        "variance_left": left.variance.tolist(),
        "gradient_left": left.gradient.tolist(),
        "terminations_predicted": predicted.item(),
        "terminations_real": real.item(),
    }


def check(cfg: Config) -> None:
    """Exit for a configuration whose networks say too little of its rewards."""
    if cfg.algorithm.normalize_rewards:
        sys.exit("algorithm.normalize_rewards=true divides rewards by a scale that the networks do not contain")
    if find_algorithm(cfg.algorithm.name).simulates:
        sys.exit(f"algorithm={cfg.algorithm.name} has no model")


def of_run(run: Path, checkpoint: str, count: int, horizon: int) -> dict[str, Any]:
    """A finished run: deterministic episodes of its policy in fresh environments."""
    cfg, networks = load_networks(run, checkpoint)
    check(cfg)
    seed = fresh_env_seed(cfg.seed)
    with opened_env(cfg.env, num_envs=count, seed=seed) as env:
        episodes = play(env, policy_module(networks.model, networks.actor), seed)
    values = value_quality(
        networks,
        episodes.observation,
        episodes.action,
        episodes.next_observation,
        episodes.reward,
        episodes.valid,
        episodes.ends,
        cfg.algorithm.gamma,
    )
    return {
        "name": f"{cfg.env.get('name')} {cfg.model.name} seed {cfg.seed}",
        "return": episodes.returns.mean().item(),
        **of_model(networks, episodes, horizon, soft=networks.actor.temperature is not None),
        "saturated": saturated_share(episodes.action, episodes.valid).item(),
        "value": values.predicted.item(),
        "value_return": values.realised.item(),
        "value_error": values.error.item(),
    }


def of_fit(model: str, env_name: str, settings: list[str], steps: int, updates: int, horizon: int) -> dict[str, Any]:
    """A model after so many updates on random actions, measured on other random episodes."""
    known = (ROOT / "configs" / "env" / f"{env_name}.yaml").exists()
    chosen = [f"env={env_name}"] if known else ["env=task", f"env.task={env_name}"]
    cfg = compose([f"model={model}", *chosen, *settings])
    check(cfg)
    seed_everything(cfg.seed)
    envs = int(cfg.env["num_envs"])
    env = make_env(cfg.env, num_envs=envs, seed=cfg.seed)
    try:
        info = env_info(env)
        with torch.no_grad():
            data = env.rollout(-(-steps // envs), break_when_any_done=False)
        held_out = play(env, random_action(env), seed=fresh_env_seed(cfg.seed))
    finally:
        env.close()
    parts = build_parts(cfg, info)
    replay = TrajectoryReplay(data.numel(), envs, cfg.algorithm.slice_length)
    replay.extend(data)
    networks = parts.networks
    if networks.model.observation_statistics is not None:
        networks.model.observation_statistics.update(data["observation"])
    if networks.model.reward_deviation is not None:
        networks.model.reward_deviation.update(data["next", "reward"])
    executor = Updates(LocalExecutor(parts.losses, parts.optimizers), cfg.memory, lambda *reduced: None)
    algorithm = find_algorithm(cfg.algorithm.name)(
        cfg.algorithm, networks, parts.losses, parts.optimizers, replay, executor
    )
    for _ in range(updates):
        algorithm.update_model(MetricRow())
    soft = not isinstance(parts.losses.actor, PWMActorLoss)
    return {"name": f"{env_name} {model}", **of_model(networks, held_out, horizon, soft)}


def table(rows: list[dict[str, Any]], horizon: int) -> str:
    """The rows as Markdown."""
    steps = sorted({1, min(4, horizon), horizon})
    errors = [f"{what} error, step {'/'.join(map(str, steps))}" for what in ("latent", "reward")]
    policy = ["return", "saturated", "value / return", "value error"] if "value_error" in rows[0] else []
    heads = ["", "latent variance", "rank", *errors, "left of the start", "gradient", "ends, predicted / real", *policy]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        cells = [r["name"], f"{r['latent_variance']:.2g}", f"{r['latent_rank']:.1f}"]
        cells += ["/".join(f"{r[key][step - 1]:.2g}" for step in steps) for key in ("latent_nmse", "reward_nmse")]
        cells += [f"{r['variance_left'][-1]:.2g}", f"{r['gradient_left'][-1]:.2g}"]
        cells.append(f"{r['terminations_predicted']:.0%} / {r['terminations_real']:.0%}")
        if policy:
            cells += [f"{r['return']:.0f}", f"{r['saturated']:.0%}"]
            cells += [f"{r['value']:.3g} / {r['value_return']:.3g}", f"{r['value_error']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RUN|KEY=VALUE", help="run directories, or settings with --env")
    parser.add_argument("--env", help="fit models to random actions in it")
    parser.add_argument("--models", nargs="+", default=["mlp", "residual", "flow_v2"], help="models for --env")
    parser.add_argument("--steps", type=int, default=20_000, help="random agent steps with --env (default 20000)")
    parser.add_argument("--updates", type=int, default=1000, help="model updates with --env (default 1000)")
    parser.add_argument("--quick", action="store_true", help="--env with 4000 steps and 200 updates")
    parser.add_argument("--horizon", type=int, default=16, help="steps of the measured rollouts (default 16)")
    parser.add_argument(
        "--checkpoint", default="last", help="checkpoint of the runs: last (the default), best or an epoch"
    )
    parser.add_argument("--episodes", type=int, default=10, help="episodes of each run's policy (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every step of the horizon to this file")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()
    settings = [word for word in args.words if "=" in word]
    runs = [Path(word) for word in args.words if "=" not in word]
    if bool(runs) == bool(args.env) or (runs and settings):
        parser.error("give run directories, or --env with settings")
    quiet_torchrl()
    torch.set_num_threads(1)
    begun = time.process_time()
    if runs:
        rows = [of_run(run, args.checkpoint, args.episodes, args.horizon) for run in runs]
        what = f"{args.episodes} deterministic episodes of each run's policy, checkpoint {args.checkpoint}"
    else:
        steps, updates = (4000, 200) if args.quick else (args.steps, args.updates)
        rows = [of_fit(model, args.env, settings, steps, updates, args.horizon) for model in args.models]
        what = f"{updates} model updates on {steps} random agent steps, measured on other random episodes, one seed"
    command = " ".join(["python benchmarks/model_quality.py", *(word for word in sys.argv[1:] if word != "--publish")])
    seconds = f"{time.process_time() - begun:.0f} s of one thread"
    provenance = f"`{command}`, {date.today().isoformat()}, {hardware()}, {seconds}"
    text = table(rows, args.horizon)
    print(f"{provenance}: {what}.\n\n{text}")
    if args.json:
        content = {"command": command, "date": date.today().isoformat(), "hardware": hardware(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.publish:
        name = "model_quality_runs.md" if runs else f"model_quality_{args.env.replace('-', '_')}.md"
        title = "Networks of runs" if runs else f"Models of {args.env}"
        page = f"# {title}\n\n{provenance}: {what}.\n\n{text}"
        (ROOT / "benchmarks" / "results" / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
