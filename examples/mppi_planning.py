"""Planning at decision time in a world model of ours, behind TorchRL's planner interface.

    python examples/mppi_planning.py --iterations 40 --seed 0
    python examples/mppi_planning.py --run runs/my_run

Trains PWM on Pendulum-v1 for so many epochs, or takes a run that exists, and compares the policy alone (before) with
:class:`~pwm_torchrl.envs.PolicySeededMPPI` (after), which searches around the policy's proposals in the world model and
counts the critics' value at the end of the plan, as TD-MPC2 does. Both act in the same episodes of the real
environment. The critics of a short run are far from done, so that plans must be longer than TD-MPC2's three steps: with
three, which trust the value most, planning is worse than the policy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from tensordict.nn import TensorDictSequential
from torch import Tensor
from torchrl.data import Bounded

from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.envs import LatentImaginationEnv, PolicySeededMPPI, env_info, make_env
from pwm_torchrl.modules import action_value_module, actor_module, encoder_module, policy_module
from pwm_torchrl.run.collector import fresh_env_seed
from pwm_torchrl.run.evaluation import play
from pwm_torchrl.run.load import load_networks
from pwm_torchrl.terminal import say
from pwm_torchrl.training import train


def make_planner(networks: Networks, options: argparse.Namespace) -> PolicySeededMPPI:
    """The planner of a run's networks; acts on latents."""
    policy = actor_module(networks.actor, action_spec=Bounded(-1.0, 1.0, (networks.actor.action_dim,)))
    critics = action_value_module(networks.critic, action_value="state_value")
    return PolicySeededMPPI(
        LatentImaginationEnv(networks.model),
        policy,
        TensorDictSequential(policy, critics),  # V(z) as Q(z, a) of the policy's action
        planning_horizon=options.horizon,
        num_candidates=options.candidates,
        num_policy_candidates=max(1, options.candidates // 16),
        top_k=max(1, options.candidates // 8),
        optim_steps=options.rounds,
        temperature=options.temperature,
    )


def train_run(options: argparse.Namespace, folder: Path) -> Path:
    """A short run with the smallest networks."""
    words = ["env=pendulum", "size=tiny", f"model={options.model}", f"seed={options.seed}", "device=cpu"]
    words += [f"training.epochs={options.iterations}", f"training.eval_every={options.iterations}"]
    words += ["training.video=false", "training.progress=false"]
    train(compose(words), folder)
    return folder


def compare(run: Path, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns of the policy and of the planner in the same episodes."""
    cfg, networks = load_networks(run, "latest")
    seed = fresh_env_seed(cfg.seed)
    env = make_env(cfg.env, num_envs=options.episodes, seed=seed)
    spec = Bounded(-1.0, 1.0, (env_info(env).action_dim,))
    alone = play(env, policy_module(networks.model, networks.actor, action_spec=spec), seed).returns
    torch.manual_seed(options.seed)  # the candidates' noise: the same whether the run was trained here or before
    planner = make_planner(networks, options)
    env = env.append_transform(planner.make_tensordict_primer())  # the plan travels from step to step in the data
    planned = play(env, TensorDictSequential(encoder_module(networks.model), planner), seed).returns
    env.close()
    return alone, planned


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Train or load, compare and say so; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40, help="epochs of the run that is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a run directory, instead of training one")
    parser.add_argument("--model", default="mlp", help="dynamics: mlp, residual, flow_v1, flow_v2 or flow_v3")
    parser.add_argument("--horizon", type=int, default=12, help="steps of a plan; TD-MPC2 has 3")
    parser.add_argument("--candidates", type=int, default=64, help="plans of a round; TD-MPC2 has 512")
    parser.add_argument("--rounds", type=int, default=3, help="in which a plan is refined; TD-MPC2 has 6")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--episodes", type=int, default=8, help="of each evaluation")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        before, after = compare(options.run or train_run(options, Path(folder)), options)
    result: dict[str, object] = {"example": "mppi_planning", "iterations": options.iterations, "seed": options.seed}
    for name, returns in (("before", before), ("after", after)):
        result |= {name: returns.mean().item(), f"{name}_std": returns.std(unbiased=False).item()}
    result |= {"episodes": options.episodes, "minutes": (time.monotonic() - started) / 60}
    say("before: return {before:.0f} ± {before_std:.0f}, after: return {after:.0f} ± {after_std:.0f}".format(**result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
