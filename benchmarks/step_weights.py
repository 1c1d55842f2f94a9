"""Does the world model learn faster with step weights 0.5^t than with PWM's gamma^t? Fixed data, no policy.

    python benchmarks/step_weights.py

Fits each dynamics of size tiny on 3200 random transitions of Pendulum-v1 and reports the open-loop reward error over
16 steps (squared error over the rewards' variance), on other random episodes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from pwm_torchrl.algorithm.build import build_losses, build_networks, build_optimizers  # noqa: E402
from pwm_torchrl.cli.compose import compose  # noqa: E402
from pwm_torchrl.data import TrajectoryReplay  # noqa: E402
from pwm_torchrl.envs import env_info, make_env  # noqa: E402
from pwm_torchrl.run.collector import seed_everything  # noqa: E402
from pwm_torchrl.run.evaluation import open_loop_errors, play, random_action  # noqa: E402


def fit(model: str, rho: float | None, updates: int, every: int) -> list[float]:
    """Held-out reward error after each ``every`` updates."""
    cfg = compose([f"model={model}", "size=tiny", "env=pendulum"])
    cfg.model.loss = replace(cfg.model.loss, rho=rho)
    torch.set_num_threads(1)
    seed_everything(0)
    env = make_env(cfg.env, num_envs=8, seed=0)
    replay = TrajectoryReplay(3200, 8, cfg.algorithm.horizon)
    replay.extend(env.rollout(400, break_when_any_done=False))
    held_out = play(env, random_action(env), seed=5000)
    networks = build_networks(cfg, env_info(env))
    loss, optimizer = build_losses(cfg, networks).model, build_optimizers(cfg, networks)["model"]
    errors = []
    for update in range(1, updates + 1):
        sum(loss(replay.sample_slices(cfg.algorithm.model_batch)).values()).backward()
        optimizer.step()
        if update % every == 0:
            found = open_loop_errors(networks.model, held_out, cfg.algorithm.horizon)
            errors.append(found["reward_nmse"])
    return errors


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few updates: checks the command, measures nothing")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_args()
    updates, every = (4, 2) if args.quick else (1200, 400)
    rows = []
    for model in ("mlp", "residual", "flow_v2"):
        for rho in (None, 0.5):
            rows.append({"model": model, "rho": rho, "reward_nmse": fit(model, rho, updates, every)})
            print(rows[-1], flush=True)
    steps = list(range(every, updates + 1, every))
    lines = [
        "# Step weights of the world-model loss",
        "",
        f"`python benchmarks/step_weights.py`, {date.today().isoformat()}, torch {torch.__version__}, one CPU thread, "
        "one seed.",
        "Held-out open-loop reward error over 16 steps (1: as good as predicting the mean), by number of updates.",
        "",
        "| dynamics | weights | " + " | ".join(map(str, steps)) + " |",
        "|---" * (2 + len(steps)) + "|",
    ]
    for row in rows:
        weights = "0.99^t (PWM)" if row["rho"] is None else "0.5^t"
        lines.append(f"| {row['model']} | {weights} | " + " | ".join(f"{e:.3f}" for e in row["reward_nmse"]) + " |")
    if args.publish:
        out = ROOT / "benchmarks" / "results" / "step_weights.md"
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps({"updates": steps, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
