"""Steps per second of every maker of environments, with random actions.

    python benchmarks/environments.py                        # all that are installed, as a table
    python benchmarks/environments.py --only rewarped_ant brax
    python benchmarks/environments.py --publish              # into benchmarks/results

Every line is measured in a process of its own with one thread, unless OMP_NUM_THREADS says otherwise. A round is so
many steps of the whole batch that it takes about half a second, resets of ended episodes included; the columns are
medians over rounds, and the spread is half the distance of the quartiles relative to the median. *With gradients* is
a rollout of 16 steps of a differentiable simulator and its backward pass, counted as 16 steps per environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

RESULTS = ROOT / "benchmarks" / "results"
#: Settings of the environment of each line.
LINES: dict[str, list[str]] = {
    "pendulum_torchrl": ["env=pendulum_torchrl"],
    "pendulum": ["env=pendulum"],
    "hopper": ["env=hopper"],
    "halfcheetah": ["env=halfcheetah"],
    "cartpole_swingup": ["env=cartpole_swingup"],
    "walker-walk": ["env=task", "env.task=walker-walk"],
    "mw-reach": ["env=task", "env.task=mw-reach"],
    "rewarped_cartpole": ["env=rewarped_cartpole"],
    "rewarped_hopper": ["env=rewarped_hopper"],
    "rewarped_ant": ["env=rewarped_ant"],
    "rewarped_humanoid": ["env=rewarped_humanoid"],
    "brax": ["env=brax", "env.id=ant"],
}
COUNTS = (1, 16, 64)
#: Steps of a rollout with gradients.
HORIZON = 16


def rounds_of(step: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds per step, one value per round of about half a second."""
    step()
    begin = time.perf_counter()
    step()
    each = max(1, round(0.5 / max(1e-6, time.perf_counter() - begin)))
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(each):
            step()
        found.append((time.perf_counter() - begin) / each)
    return found


def measure(words: list[str], count: int, seconds: float) -> dict[str, Any]:
    """The rounds of one environment, in this process."""
    import torch

    from pwm_torchrl.cli.compose import compose
    from pwm_torchrl.envs import env_info, make_env

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    torch.manual_seed(0)
    env = make_env(compose(words).env, num_envs=count, seed=0)
    info = env_info(env)
    state = [env.reset()]
    actions = torch.rand(64, count, info.action_dim) * 2 - 1
    made = [0]

    def step() -> None:
        made[0] += 1
        _, state[0] = env.step_and_maybe_reset(state[0].set("action", actions[made[0] % len(actions)]))

    found: dict[str, Any] = {
        "action_repeat": info.action_repeat,
        "plain": rounds_of(step, seconds),
    }
    if info.simulator is not None:
        simulator = info.simulator
        start = simulator.reset(count, torch.Generator().manual_seed(0))

        def rollout() -> None:
            now, total = start, torch.zeros(())
            taken = actions[:HORIZON].clone().requires_grad_()
            for action in taken:
                now, reward, _ = simulator.step(now, action)
                total = total + reward.sum()
            total.backward()

        found["gradients"] = [each / HORIZON for each in rounds_of(rollout, seconds)]
    env.close()
    return found


def measured(name: str, count: int, seconds: float) -> dict[str, Any]:
    """:func:`measure` in a process of its own; ``{"error": ...}`` if that fails, with the reason's last line."""
    command = [sys.executable, __file__, "--line", name, "--count", str(count), "--seconds", str(seconds)]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": re.sub(r"^pwm_torchrl\.errors\.\w+: ", "", last)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rate(seconds: list[float], steps: int) -> str:
    """Steps per second and the spread of the rounds, as text."""
    low, _, high = quantiles(seconds, n=4)
    return f"{steps / median(seconds):,.0f} (± {(high - low) / 2 / median(seconds):.0%})"


def document(rows: list[tuple[str, int, dict[str, Any]]], hardware: str) -> str:
    """The table as Markdown, with what could not be measured below it."""
    lines = [
        "# Steps per second of the environments",
        "",
        f"`python benchmarks/environments.py`, {date.today().isoformat()}, {hardware}; one thread, random actions, "
        f"load of the machine {os.getloadavg()[0]:.1f}. Agent steps per second of the whole batch.",
        "",
        "| `env=` | environments | steps per second | with gradients | environment steps per agent step |",
        "|---|---|---|---|---|",
    ]
    failed: dict[str, str] = {}
    for name, count, found in rows:
        if "error" in found:
            failed[name] = found["error"]
            continue
        gradients = rate(found["gradients"], count) if "gradients" in found else ""
        lines.append(f"| {name} | {count} | {rate(found['plain'], count)} | {gradients} | {found['action_repeat']} |")
    if failed:
        lines += ["", "Not measured:", "", *(f"- {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each line in turn, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="NAME", help=", ".join(LINES))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of environments")
    parser.add_argument("--seconds", type=float, default=4.0, help="per line, after three rounds")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results/environments.md")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line:
        print(json.dumps(measure(LINES[args.line], args.count, args.seconds)))
        return
    from benchmarks.learning import hardware

    rows = []
    for name in args.only:
        for count in args.counts:
            rows.append((name, count, measured(name, count, args.seconds)))
            found = rows[-1][2]
            print(f"{name:<18} {count:>3}  {found.get('error') or rate(found['plain'], count)}", flush=True)
            if "error" in found:
                break
    text = document(rows, hardware())
    print("\n" + text)
    if args.publish:
        (RESULTS / "environments.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
