"""The lines of the speed suite: what one process measures of one model at one size, as JSON on its last line.

Run by ``speed.py`` with the tree to measure first on the path, which may be another commit's: the updates are therefore
made from the public modules and losses, whose names stay. What such a tree lacks is ``null``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from plain_pwm import PlainPWM, PlainUpdates
from tensordict import TensorDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModelSpec,
    actor_module,
    make_world_model,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss

try:
    from pwm_torchrl.choices import sizes

    SIZES: Any = sizes()
except ImportError:  # a tree from before the sizes had one home
    from pwm_torchrl.modules import SIZES

OBSERVATION, ACTION, HORIZON = 37, 8, 16  # dflex's Ant
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "residual": {"kind": "residual"},
    "flow_v1": {"kind": "flow", "solver": "heun", "substeps": 2},
    "flow_v2": {"kind": "flow", "solver": "heun", "substeps": 4},
    "flow_v3": {"kind": "flow", "solver": "euler", "substeps": 8},
    "few_step": {"kind": "flow", "solver": "heun", "substeps": 4, "imagination_substeps": 1},
}


@dataclass(frozen=True)
class Batches:
    """How large the updates of an epoch are and how many it has."""

    model: int
    actor: int
    model_updates: int
    actor_updates: int
    passes: int
    minibatches: int = 4


BATCHES = {
    "tiny": Batches(64, 128, 8, 3, 3),
    "5m": Batches(256, 128, 8, 1, 8),
    "48m": Batches(1024, 512, 8, 1, 8),
}


def median_of(function: Callable[[], Any], seconds: float, least: int = 3) -> list[float]:
    """Times of single calls, seconds, after one that is not counted."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times.append(timed(function))
    return times


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternately(functions: dict[str, Callable[[], Any]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Times of each function, called in turn, so that a change of the machine's speed meets all of them."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, function in functions.items():
            times[name].append(timed(function))
    return times


def operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def matrix_rate(rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of a product ``[rows, width] x [width, width]``: the best of several."""
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    repeats = max(1, int(2e9 / (2 * rows * width * width)))

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return 2 * rows * width * width * repeats / min(median_of(products, 0.3))


# The package's updates and the plain ones -----------------------------------------------------------------------------


class OurUpdates:
    """The package's losses, each with its clipping and Adam, on the same batches as the plain ones.

    Args:
        model (str): of :data:`MODELS`.
        size (str): of the package's sizes.
        device (str): where it computes.
        options (dict): keyword arguments of the losses, such as ``compile``; those that a loss does not know are left
            out.
    """

    def __init__(self, model: str, size: str, device: str, options: dict[str, Any]) -> None:
        widths = SIZES[size]
        spec = WorldModelSpec(
            OBSERVATION, ACTION, widths.latent_dim, widths.units, widths.encoder_units, dynamics=dict(MODELS[model])
        )
        self.world_model = make_world_model(spec).to(device)
        self.actor_net = Actor(widths.latent_dim, ACTION, widths.actor_units).to(device)
        critics = CriticEnsemble(widths.latent_dim, widths.critic_units).to(device)
        self.model_loss = PWMModelLoss(self.world_model, **known(PWMModelLoss, options))
        self.actor_loss = PWMActorLoss(
            actor_module(self.actor_net),
            world_model_module(self.world_model),
            value_module(critics),
            horizon=HORIZON,
            **known(PWMActorLoss, options),
        ).to(device)
        self.critic_loss = PWMValueLoss(critics, **known(PWMValueLoss, options))
        self.norms = {"model": 20.0, "actor": 1.0, "critic": 100.0}
        self.parameters = {
            "model": list(self.world_model.parameters()),
            "actor": list(self.actor_net.parameters()),
            "critic": list(critics.parameters()),
        }
        self.adam = {
            "model": torch.optim.Adam(self.parameters["model"], 3e-4, fused=True),
            "actor": torch.optim.Adam(self.parameters["actor"], 5e-4, (0.7, 0.95), fused=True),
            "critic": torch.optim.Adam(self.parameters["critic"], 5e-4, (0.7, 0.95), fused=True),
        }

    def _step(self, name: str) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters[name], self.norms[name])
        self.adam[name].step()
        self.adam[name].zero_grad()

    def model(self, slices: TensorDict) -> None:
        """One model update."""
        self.model_loss.backward(self.model_loss.read(slices))
        self._step("model")

    def actor(self, observation: Tensor) -> TensorDict:
        """One actor update; the states for the critics."""
        with torch.no_grad():
            latent = self.world_model.encode(observation)
        _, rollout = self.actor_loss.backward(TensorDict(latent=latent, batch_size=[len(latent)]))
        self._step("actor")
        return rollout.select("latent", "value_target", ("collector", "mask")).flatten()

    def critics(self, states: TensorDict, passes: int, minibatches: int) -> None:
        """Shuffled passes over imagined states."""
        for rows in PlainUpdates.shuffled(len(states), passes, minibatches):
            self.critic_loss.backward(states[rows.to(states["latent"].device)])
            self._step("critic")


def known(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those options that a loss takes."""
    return {name: value for name, value in options.items() if name in signature(function.__init__).parameters}


def plain_updates(model: str, size: str) -> PlainUpdates:
    """The plain implementation of the same model."""
    widths, options = SIZES[size], MODELS[model]
    solver = "mlp" if options["kind"] == "mlp" else str(options.get("solver", "euler"))
    return PlainUpdates(
        PlainPWM(
            OBSERVATION,
            ACTION,
            widths.latent_dim,
            widths.units,
            widths.encoder_units,
            widths.actor_units,
            widths.critic_units,
            solver,
            int(options.get("substeps", 1)),
        ),
        HORIZON,
    )


class Lines:
    """Measures the lines of one model, size and precision.

    Args:
        args (argparse.Namespace): of :func:`main`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        self.batches = BATCHES[args.size]
        torch.manual_seed(0)
        options = {"compile": args.compile, "precision": args.precision}
        self.ours = OurUpdates(args.model, args.size, self.device, options)
        plain = args.device == "cpu" and args.precision == "fp32" and not args.no_plain
        self.plain = plain_updates(args.model, args.size) if plain else None
        self.rates: dict[str, float] = {}

    def measure(self) -> dict[str, Any]:
        """Every line by name: its times, floor and, where there is one, the plain implementation's times."""
        wanted = {
            "model update": self.model_update,
            "actor update": self.actor_update,
            "critic updates": self.critic_updates,
            "imagination": self.imagination,
            "replay sampling": self.replay_sampling,
            "memory planning": self.planning,
            "collection": self.collection,
        }
        chosen = self.args.lines.split(",") if self.args.lines else list(wanted)
        lines = {name: wanted[name]() for name in wanted if name in chosen}
        if {"model update", "actor update", "critic updates"} <= lines.keys():
            lines["updates of an epoch"] = self.epoch(lines)
        return lines

    def _line(self, ours: Callable[[], Any], plain: Callable[[], Any] | None, rows: int) -> dict[str, Any]:
        """Times of the package and of the plain implementation, in turn, and the floor."""
        started = time.perf_counter()
        ours()  # compiles, if anything is compiled
        first = time.perf_counter() - started
        count = 0 if self.args.no_floor else operations(ours)
        functions = {"ours": ours} | ({} if plain is None else {"plain": plain})
        times = alternately(functions, self.args.seconds, self.args.least)
        width = SIZES[self.args.size].units[0]
        dtype = torch.float32 if self.args.precision == "fp32" else torch.bfloat16
        rate = matrix_rate(rows, width, dtype, self.device)
        return {**times, "first": first, "operations": count, "rate": rate, "floor": count / rate}

    def _slices(self) -> tuple[TensorDict, tuple[Tensor, Tensor, Tensor]]:
        """One batch as the package reads it and as the plain implementation does."""
        b, h = self.batches.model, HORIZON
        observation = torch.randn(h + 1, b, OBSERVATION)
        action, reward = torch.rand(h, b, ACTION) * 2 - 1, torch.randn(h, b, 1)
        going = torch.zeros(b, h, 1, dtype=torch.bool)
        step = TensorDict(
            observation=observation[1:].transpose(0, 1),
            reward=reward.transpose(0, 1),
            done=going,
            terminated=going,
            batch_size=[b, h],
        )
        slices = TensorDict(
            observation=observation[:-1].transpose(0, 1), action=action.transpose(0, 1), next=step, batch_size=[b, h]
        )
        return slices.contiguous().to(self.device), (observation, action, reward)

    def model_update(self) -> dict[str, Any]:
        """Loss, gradients, clipping, Adam."""
        slices, arrays = self._slices()
        plain = self.plain
        return self._line(
            lambda: self.ours.model(slices), None if plain is None else lambda: plain.model(*arrays), self.batches.model
        )

    def actor_update(self) -> dict[str, Any]:
        """Imagination, gradients, clipping, Adam and the critics' targets."""
        observation = torch.randn(self.batches.actor, OBSERVATION, device=self.device)
        plain = self.plain
        return self._line(
            lambda: self.ours.actor(observation),
            None if plain is None else lambda: plain.actor(observation),
            self.batches.actor,
        )

    def critic_updates(self) -> dict[str, Any]:
        """All critic updates that follow one actor update."""
        observation = torch.randn(self.batches.actor, OBSERVATION, device=self.device)
        states = self.ours.actor(observation)
        plain, b = self.plain, self.batches
        other: Callable[[], None] | None = None
        if plain is not None:
            arrays = plain.actor(observation)

            def other() -> None:
                plain.critics(*arrays, b.passes, b.minibatches)

        rows = len(states) // b.minibatches
        return self._line(lambda: self.ours.critics(states, b.passes, b.minibatches), other, rows)

    @torch.no_grad()
    def imagination(self) -> dict[str, Any]:
        """A rollout without gradients."""
        start = self.ours.world_model.encode(torch.randn(self.batches.actor, OBSERVATION, device=self.device))
        plain, horizon = self.plain, HORIZON
        other: Callable[[], Any] | None = None
        if plain is not None:
            z, noise = start.clone(), torch.randn(horizon, len(start), ACTION)

            def other() -> None:
                latents, _ = plain.pwm.rollout(z, horizon, noise)
                plain.pwm.values(latents[1:])

        with torch.no_grad():
            return self._line(lambda: self.ours.actor_loss.imagine(start), other, self.batches.actor)

    def epoch(self, lines: dict[str, Any]) -> dict[str, Any]:
        """The updates of an epoch, from the lines before; ``speed.py`` times whole epochs of real runs, too."""
        counts = {
            "model update": self.batches.model_updates,
            "actor update": self.batches.actor_updates,
            "critic updates": self.batches.actor_updates,
        }

        def total(key: str) -> list[float]:
            columns = [[count * value for value in lines[name][key]] for name, count in counts.items()]
            return [sum(values) for values in zip(*columns, strict=False)]

        keys = [key for key in ("ours", "plain") if all(key in lines[name] for name in counts)]
        out: dict[str, Any] = {key: total(key) for key in keys}
        for key in ("operations", "floor"):
            out[key] = sum(count * lines[name][key] for name, count in counts.items())
        return out

    # Lines that do not depend on the model's arithmetic ---------------------------------------------------------------

    def replay_sampling(self) -> dict[str, Any] | None:
        """One batch of slices out of a replay in memory."""
        from pwm_torchrl.data import TrajectoryReplay

        envs, steps = 16, 2000
        with tempfile.TemporaryDirectory() as folder:
            replay = TrajectoryReplay(
                envs * steps,
                envs,
                HORIZON,
                "memory",
                Path(folder),
                torch.device("cpu"),
                observation_dim=OBSERVATION,
                action_dim=ACTION,
            )
            done = torch.zeros(envs, steps, 1, dtype=torch.bool)
            step = TensorDict(
                observation=torch.randn(envs, steps, OBSERVATION),
                reward=torch.randn(envs, steps, 1),
                done=done,
                terminated=done,
                batch_size=[envs, steps],
            )
            replay.extend(
                TensorDict(
                    observation=torch.randn(envs, steps, OBSERVATION),
                    action=torch.rand(envs, steps, ACTION),
                    next=step,
                    batch_size=[envs, steps],
                )
            )
            return {"ours": median_of(lambda: replay.sample_slices(self.batches.model), min(1, self.args.seconds), 20)}

    def _config(self) -> Any:
        try:
            from pwm_torchrl.config import Config
        except ImportError:  # a tree of another layout
            return None
        cfg, widths, batches = Config(), SIZES[self.args.size], self.batches
        cfg.model.name, cfg.size.name = self.args.model, self.args.size
        cfg.size.latent_dim = widths.latent_dim
        cfg.size.units, cfg.size.encoder_units = list(widths.units), list(widths.encoder_units)
        cfg.size.actor_units, cfg.size.critic_units = list(widths.actor_units), list(widths.critic_units)
        for name, value in MODELS[self.args.model].items():
            setattr(cfg.model.dynamics, name, value)
        cfg.algorithm.model_batch, cfg.algorithm.actor_batch = batches.model, batches.actor
        cfg.training.replay_storage, cfg.training.replay_capacity = "memory", 100_000
        cfg.env = {
            "_target_": "pwm_torchrl.envs.make_gymnasium_env",
            "name": "halfcheetah",
            "id": "HalfCheetah-v5",
            "num_envs": 16,
        }
        return cfg

    def planning(self) -> dict[str, Any] | None:
        """The memory plan at the start of a run, once: a process asks for it only once."""
        cfg = self._config()
        if cfg is None:
            return None
        from pwm_torchrl.envs import EnvInfo
        from pwm_torchrl.memory.plan import budgets, make_plan

        facts = EnvInfo(
            name="ant",
            observation_dim=OBSERVATION,
            action_dim=ACTION,
            num_envs=16,
            action_repeat=1,
            episode_length=1000,
            terminates=False,
        )
        return {"ours": [timed(lambda: make_plan(cfg, facts, budgets(cfg, None)))]}

    def collection(self) -> dict[str, Any] | None:
        """An epoch's data, 16 steps of 16 HalfCheetahs, where MuJoCo is installed."""
        cfg = self._config()
        if cfg is None:
            return None
        try:
            from torchrl.data import Bounded

            from pwm_torchrl.algorithm.base import MetricRow
            from pwm_torchrl.modules import policy_module
            from pwm_torchrl.run.sources import open_source
            from pwm_torchrl.terminal import Progress
        except ImportError:
            return None
        with tempfile.TemporaryDirectory() as folder:
            source = open_source(cfg, Path(folder))
            try:
                info, widths = source.info, SIZES[self.args.size]
                spec = WorldModelSpec(
                    info.observation_dim,
                    info.action_dim,
                    widths.latent_dim,
                    widths.units,
                    widths.encoder_units,
                    dynamics=dict(MODELS[self.args.model]),
                )
                model, actor = make_world_model(spec), Actor(widths.latent_dim, info.action_dim, widths.actor_units)
                policy = policy_module(
                    model, actor, action_spec=Bounded(-1.0, 1.0, (info.action_dim,), device=self.device)
                )
                networks: Any = argparse.Namespace(model=model, actor=actor)
                source.start(cfg, Path(folder), networks, policy, torch.device(self.device), Progress())
                return {"ours": median_of(lambda: source.collect(MetricRow()), min(2, self.args.seconds))}
            finally:
                source.close()


def main() -> None:
    """Measure, and print the result as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--size", choices=BATCHES, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--lines", default="", help="names separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per line")
    parser.add_argument("--least", type=int, default=3, help="minimum number of repetitions of a line")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--no-floor", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    before = os.getloadavg()[0]
    result: dict[str, Any] = {"args": vars(args), "lines": Lines(args).measure()}
    result["load"] = [before, os.getloadavg()[0]]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
