"""Runs of one and of several processes, forked from this process after its imports; see test_distributed.py.

``python -m ranked_runs FOLDER [CASE...]`` writes, for each case, a folder with its run and the final weights, a file
with the output of each process, and ``ends.json`` with the exit codes.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_cases import write_store
from tensordict import TensorDictBase
from torchrl.envs import DTypeCastTransform, EnvBase, TransformedEnv
from training_cases import config, run_with, stop_after, weights_of

import pwm_torchrl.run.train as run_module
from pwm_torchrl.algorithm.build import NetworkOptimizer
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.distributed import updates as shared_updates
from pwm_torchrl.envs import make_gymnasium_env
from pwm_torchrl.memory.trace import Persistent, Transient, UpdateTracer
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.run.stop import StopRequest, stop_on_signals
from pwm_torchrl.run.stored_episodes import StoredSamples

train_command = partial(run_command, "train")

TIMEOUT_S = 60.0  # per case; afterwards its processes are killed and the tests fail


def make_double_pendulum(num_envs: int, seed: int, episode_length: int) -> EnvBase:
    """Pendulum with float64 observations and actions."""
    env = make_gymnasium_env("Pendulum-v1", num_envs=num_envs, seed=seed, episode_length=episode_length)
    return TransformedEnv(
        env, DTypeCastTransform(torch.float32, torch.float64, in_keys=["observation"], in_keys_inv=["action"])
    )


ENV = {"_target_": "ranked_runs.make_double_pendulum", "name": "pendulum", "num_envs": 2, "episode_length": 15}
FEW = {
    "training.epochs": 3,
    "training.eval_every": 0,
    "training.eval_episodes": 1,
    "training.checkpoint_every": 0,
    "training.check_graphs": False,
    "algorithm.first_model_updates": 2,
    "algorithm.critic_passes": 1,
}
MLP = {"model.dynamics.kind": "mlp"}
FLOW_V2 = {"model.dynamics.substeps": 4, "model.loss.flow_matching_weight": 0.5}
#: Batches with an odd number of rows; the last minibatch of the critics has one of 28 states, on rank 0.
UNEVEN = {"algorithm.model_batch": 9, "algorithm.actor_batch": 7, "algorithm.critic_minibatches": 10}
MICRO = {"memory.model_micro_batch": 2, "memory.actor_micro_batch": 3, "memory.critic_micro_batch": 1}
STATISTICS = {
    "algorithm.normalize_observations": True,
    "algorithm.normalize_rewards": True,
    "model.termination_head": True,
    "model.loss.flow_matching_source": "attached",
}

PRETRAIN = {
    "mode": "pretrain",
    "algorithm.model_updates": 4,
    "model.reward_head": "two_hot",
    "model.loss.form": "tdmpc2",
    "training.eval_every": 1,
    "data.validation_fraction": 0.3,
}

Fault = Callable[[pytest.MonkeyPatch, int], None]


@dataclass
class Case:
    """A run of several processes; with ``alone``, also of a single process."""

    changes: dict[str, Any] = field(default_factory=dict)
    size: int = 2
    alone: bool = True
    stop_after: int | None = None  # then resumed
    fault: Fault | None = None
    by_command: bool = False
    stored: bool = False  # pre-training on an episode store


def nth(call: int, function: Callable[..., Any], then: Callable[[], Any], after: bool = False) -> Callable[..., Any]:
    """Wrap ``function`` so that ``then`` runs before or after its ``call``-th call."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            then()
        result = function(*args, **kwargs)
        if calls == call and after:
            then()
        return result

    return counted


def refuse() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def refusals(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 1 runs out of memory in a backward pass and after a step; rank 0 in two other updates."""
    if rank == 1:
        patch.setattr(PWMModelLoss, "backward", nth(2, PWMModelLoss.backward, refuse))
        step = NetworkOptimizer.step
        refused = nth(2, step, refuse, after=True)
        patch.setattr(
            NetworkOptimizer, "step", lambda self, before: (refused if self.max_norm == 1.0 else step)(self, before)
        )
    else:
        patch.setattr(PWMActorLoss, "draw_noise", nth(3, PWMActorLoss.draw_noise, refuse, after=True))
        patch.setattr(PWMValueLoss, "backward", nth(3, PWMValueLoss.backward, refuse))


def refused_start(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 1 has no memory for the networks."""
    if rank == 1:
        patch.setattr(shared_updates, "build_parts", lambda cfg, facts, device: refuse())


def die(rank: int) -> Fault:
    """A rank is killed in its fourth model update."""

    def fault(patch: pytest.MonkeyPatch, mine: int) -> None:
        if mine == rank:
            kill = nth(4, PWMModelLoss.backward, lambda: os.kill(os.getpid(), signal.SIGKILL))
            patch.setattr(PWMModelLoss, "backward", kill)

    return fault


def interrupt(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Every process gets a stop signal, as from a terminal or SLURM; only rank 0 handles it."""

    def tell() -> None:
        for number in [signal.SIGINT] if rank == 0 else [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]:
            os.kill(os.getpid(), number)

    patch.setattr(PWMModelLoss, "backward", nth(2, PWMModelLoss.backward, tell))


def bug(patch: pytest.MonkeyPatch, rank: int) -> None:
    def fail() -> None:
        raise ZeroDivisionError("nothing is 1 / 0")

    if rank == 1:
        patch.setattr(PWMValueLoss, "backward", nth(3, PWMValueLoss.backward, fail))


def drift(patch: pytest.MonkeyPatch, rank: int) -> None:
    """A weight of rank 1 changes by its last bit."""
    if rank == 1:
        step = NetworkOptimizer.step

        def changed(self: NetworkOptimizer, before: Callable[[], None]) -> torch.Tensor:
            norm = step(self, before)
            if self.max_norm == 20.0:
                weight = self.parameters[0].data.view(-1)
                weight[0] = torch.nextafter(weight[0], torch.tensor(2.0, dtype=weight.dtype))
            return norm

        patch.setattr(NetworkOptimizer, "step", changed)


CASES = {
    "mlp": Case({**MLP, "algorithm.normalize_returns": False, "training.check_graphs": True}),
    # Rank 2 has no row of two rollouts, and no row of the last minibatch of a pass.
    "mlp_micro": Case({**MLP, **UNEVEN, **MICRO, "algorithm.actor_batch": 2}, size=3, stop_after=2),
    "flow_v2": Case({**FLOW_V2, **UNEVEN, "algorithm.actor_starts": "current"}),
    "flow_v2_micro": Case({**FLOW_V2, **MICRO, **STATISTICS}),
    "pretrain": Case({**FLOW_V2, **PRETRAIN, "algorithm.model_batch": 9}, stop_after=2, stored=True),
    "refused": Case({**FLOW_V2, **UNEVEN, "algorithm.actor_starts": "current"}, alone=False, fault=refusals),
    "replica_killed": Case(alone=False, fault=die(1)),
    "leader_killed": Case(alone=False, fault=die(0)),
    "bug": Case(alone=False, fault=bug),
    "interrupted": Case(alone=False, fault=interrupt),
    "no_room": Case(alone=False, fault=refused_start),
    "drift": Case(alone=False, fault=drift),
    "command": Case(alone=False, by_command=True),
    "start_up": Case({"device": "cuda:1"}, alone=False),
}
COMMAND = [
    *("size=tiny", "env=pendulum", "model=mlp", "env.num_envs=2", "algorithm.horizon=4", "training.epochs=1"),
    *("algorithm.first_model_updates=1", "training.eval_episodes=1", "training.video=false", "device=cpu"),
]


def run_case(case: Case, folder: Path, rank: int, size: int) -> int:
    """Train in this forked process; rank 0 saves its weights."""
    with pytest.MonkeyPatch.context() as patch:
        # Figures and memory plans take longer than these runs.
        patch.setattr(run_module, "write_curves", lambda run_dir: None)
        patch.setattr(UpdateTracer, "transient", lambda self, update, micro_batch=None: Transient((1,), 0, 0))
        patch.setattr(UpdateTracer, "persistent", Persistent(1, 1, 1))
        if case.by_command:
            return train_command([*COMMAND, f"run_dir={folder}"])
        torch.set_default_dtype(torch.float64)
        # As the function is inside, which makes runs independent of that default.
        patch.setattr(run_module, "train", run_module.train.__wrapped__)  # type: ignore[attr-defined]
        torch.set_num_threads(1)
        cfg = config({**FEW, **case.changes}, env=ENV)
        if case.stored:
            cfg.data.path = str(folder.with_name("store"))
            drawn = StoredSamples.slices
            patch.setattr(StoredSamples, "slices", lambda self, rows: in_double(drawn(self, rows)))
            patch.setattr(shared_updates, "COMPARE_EVERY", 2)
        if case.fault is not None and size > 1:
            case.fault(patch, rank)
        if rank:
            ends = []
            for attempt in range(1 if case.stop_after is None else 2):
                os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[attempt]
                stop = StopRequest()
                with stop_on_signals(
                    stop, 0.0, ignore_afterwards=True
                ):  # this process takes no steps, so it has no deadline
                    ends.append(run_module.train(cfg, folder, stop=stop))
            folder.with_name(f"{folder.name}_rank{rank}.json").write_text(json.dumps(ends))
            return 0
        os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[0]
        hook = None if case.stop_after is None else stop_after(case.stop_after)
        _, run = run_with(patch, cfg, folder, after_epoch=hook)
        if case.stop_after is not None:
            os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[1]
            _, run = run_with(patch, cfg, folder, resume=True)
    torch.save(weights_of(run), folder / "weights.pt")
    return 0


def in_double(slices: TensorDictBase) -> TensorDictBase:
    """Slices in float64; a store has float32."""
    return slices.apply(lambda x: x.double() if x.is_floating_point() else x)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def fork_rank(case: Case, folder: Path, rank: int, size: int, ports: list[int]) -> int:
    """Fork a child that trains and exits with an exit code; returns its process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder.with_name(f"{folder.name}_rank{rank}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["PORTS"] = " ".join(map(str, ports))
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    try:
        code = run_case(case, folder, rank, size)
    except Exception:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if case.alone:  # a regular exit takes longer than the run; other cases test it
        os._exit(code)
    sys.exit(code)


def wait_for(children: dict[int, int]) -> list[int | str]:
    """Exit codes by rank; ``"stuck"`` for a process that had to be killed."""
    ends: dict[int, int | str] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(ends) < len(children):
        for rank, child in children.items():
            if rank not in ends:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ends[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    ends[rank] = "stuck"
        time.sleep(0.02)
    return [ends[rank] for rank in sorted(ends)]


def main(out: Path, names: list[str]) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # or the tests' own is inherited, which may be to ignore it
    gc.freeze()  # otherwise a child's first garbage collection would copy all shared memory
    ends: dict[str, list[int | str]] = {}
    write_store(out / "store")
    for name in names or CASES:
        case = CASES[name]
        for size in (1, case.size) if case.alone else (case.size,):
            folder = out / f"{name}_{size}"
            folder.mkdir(parents=True)
            ports = free_ports(2)
            started = time.monotonic()
            children = {rank: fork_rank(case, folder, rank, size, ports) for rank in range(size)}
            ends[folder.name] = wait_for(children)
            print(folder.name, ends[folder.name], f"{time.monotonic() - started:.1f} s", flush=True)
    (out / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    sys.modules["ranked_runs"] = sys.modules["__main__"]  # the module name of the environment's maker
    make_double_pendulum(1, 0, 1).close()  # imports what it needs
    main(Path(sys.argv[1]), sys.argv[2:])
