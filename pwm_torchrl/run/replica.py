"""The work of ranks other than 0: build the same networks, load rank 0's state, and compute shares of its updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from pwm_torchrl.algorithm.base import build_parts
from pwm_torchrl.algorithm.build import EnvFacts, Facts, facts_of
from pwm_torchrl.config import Config
from pwm_torchrl.devices import set_precision, set_threads
from pwm_torchrl.distributed.ranks import Ranks, RemoteOutOfMemory
from pwm_torchrl.distributed.updates import SharedExecutor
from pwm_torchrl.errors import ConfigurationError, RankFault

AnyDataclass = TypeVar("AnyDataclass")

#: Signals that reach every process of a job. Only rank 0 handles them; it ends the others.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def check_device(device: str, ranks: Ranks) -> None:
    """Refuse a device with a number, which only one rank could use.

    Raises:
        ConfigurationError: if it has a number.
    """
    if ":" in device:
        raise ConfigurationError(
            f"device={device!r} is one GPU for {ranks.size} ranks; choose auto, cpu or cuda, so that each uses its own."
        )


def start_replicas(cfg: Config, facts: EnvFacts, shared: SharedExecutor) -> None:
    """Make the other ranks build rank 0's networks and load its state.

    Raises:
        RankFault: if one of them cannot; smaller micro-batches would not help.
    """
    ranks = shared.ranks
    device = next(shared.networks.model.parameters()).device
    known = facts_of(facts)
    ranks.idle = False
    # Without the environment's settings, which may not be JSON-compatible: only rank 0 has environments.
    ranks.broadcast_command({"start": asdict(replace(cfg, env={})), "facts": known, "device": device.type})
    ranks.use_device(device)
    try:
        with ranks.all_or_none():
            pass
        share_state(shared)
    except RemoteOutOfMemory as refused:
        ranks.broken = True
        raise RankFault(f"The networks do not fit into the memory of every rank ({refused}).") from refused
    ranks.idle = True


def follow_start(command: Mapping[str, Any], ranks: Ranks) -> SharedExecutor:
    """Build the networks and load rank 0's state, after the command of :func:`start_replicas`."""
    ranks.idle = False
    cfg = dataclass_from_dict(Config, command["start"])
    set_threads(cfg.training.threads)
    set_precision(cfg.training.precision)
    device = device_of_rank(command["device"], ranks.local_rank)
    ranks.use_device(device)
    with ranks.all_or_none():
        parts = build_parts(cfg, Facts(**command["facts"]), device)
        shared = SharedExecutor(parts.networks, parts.losses, parts.optimizers, ranks)
    share_state(shared)
    ranks.idle = True
    return shared


def share_state(shared: SharedExecutor) -> None:
    """Copy networks, optimizers and return statistics from rank 0 to all ranks."""
    ranks = shared.ranks
    modules = [module for _, module in shared.networks.items()]
    if shared.losses.return_statistics is not None:
        modules.append(shared.losses.return_statistics)
    for module in modules:
        state = ranks.broadcast_tensors(module.state_dict() if ranks.is_rank_zero else None)
        with ranks.all_or_none():
            if not ranks.is_rank_zero:
                module.load_state_dict(state)
    for optimizer in shared.optimizers.values():
        _share_optimizer(optimizer.optimizer, ranks)


def _share_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    content = optimizer.state_dict()
    flat = {f"{index}.{key}": x for index, state in content["state"].items() for key, x in state.items()}
    received = ranks.broadcast_tensors(flat if ranks.is_rank_zero else None)
    with ranks.all_or_none():
        if not ranks.is_rank_zero:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in received.items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**content, "state": state})


def serve(ranks: Ranks) -> str:
    """Compute shares of rank 0's updates until its run ends.

    Returns:
        str: the final status of the run.

    Raises:
        RankFault: if another rank has failed or cannot be reached.
    """
    shared: SharedExecutor | None = None
    with _signals_ignored():
        while ranks.end_status is None:
            command = ranks.receive_command()
            if "start" in command:
                shared = follow_start(command, ranks)
            elif shared is not None and "update" in command:
                shared.follow(command)
    return ranks.end_status


def device_of_rank(kind: str, local_rank: int) -> torch.device:
    """This rank's device: the GPU with the number of the local rank, or the only visible one.

    Raises:
        ConfigurationError: if there are fewer GPUs than ranks.
    """
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if count == 0 or local_rank >= count > 1:
        raise ConfigurationError(f"Rank {local_rank} of this node needs a GPU of its own; PyTorch sees {count}.")
    return torch.device("cuda", local_rank if count > 1 else 0)


def dataclass_from_dict(kind: type[AnyDataclass], values: Mapping[str, Any]) -> AnyDataclass:
    """Create a dataclass from its ``asdict``."""
    hints = get_type_hints(kind)
    made = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value, hint = values[field.name], hints[field.name]
        made[field.name] = dataclass_from_dict(hint, value) if isinstance(hint, type) and is_dataclass(hint) else value
    return kind(**made)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    present = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {each: signal.signal(each, signal.SIG_IGN) for each in present}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
