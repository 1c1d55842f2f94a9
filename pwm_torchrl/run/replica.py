"""What ranks beside rank 0 do: build the same networks, take over rank 0's state, and compute shares of its updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from pwm_torchrl.algorithm.build import EnvFacts, Facts, build_parts, facts_of
from pwm_torchrl.config import Config
from pwm_torchrl.devices import set_threads
from pwm_torchrl.distributed.ranks import Ranks, Refused
from pwm_torchrl.distributed.updates import SharedExecutor
from pwm_torchrl.errors import ConfigurationError, RankFault

AnyDataclass = TypeVar("AnyDataclass")

#: Sent to every process of a job, and rank 0's alone to answer: it ends the others.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def check_device(device: str, ranks: Ranks) -> None:
    """Refuse a device that only one rank could have.

    Raises:
        ConfigurationError: if it has a number.
    """
    if ":" in device:
        raise ConfigurationError(
            f"device={device!r} is one GPU for {ranks.size} ranks; choose auto, cpu or cuda, and each takes its own."
        )


def start_replicas(cfg: Config, facts: EnvFacts, shared: SharedExecutor) -> None:
    """Have the others build what rank 0 has, and give them its state.

    Raises:
        RankFault: if one of them cannot; smaller micro-batches would not help it.
    """
    ranks = shared.ranks
    device = next(shared.networks.model.parameters()).device
    known = facts_of(facts)
    ranks.idle = False
    # Only rank 0 has environments, and their settings may be anything.
    ranks.say({"start": asdict(replace(cfg, env={})), "facts": known, "device": device.type})
    ranks.use(device)
    try:
        with ranks.agreeing():
            pass
        share_state(shared)
    except Refused as refused:
        ranks.broken = True
        raise RankFault(f"The networks do not fit into the memory of every rank ({refused}).") from refused
    ranks.idle = True


def follow_start(command: Mapping[str, Any], ranks: Ranks) -> SharedExecutor:
    """The counterpart of :func:`start_replicas`."""
    ranks.idle = False
    cfg = made_of(Config, command["start"])
    set_threads(cfg.training.threads)
    device = own_device(command["device"], ranks.local_rank)
    ranks.use(device)
    with ranks.agreeing():
        parts = build_parts(cfg, Facts(**command["facts"]), device)
        shared = SharedExecutor(parts.networks, parts.losses, parts.optimizers, ranks)
    share_state(shared)
    ranks.idle = True
    return shared


def share_state(shared: SharedExecutor) -> None:
    """Make networks, optimizers and return statistics those of rank 0."""
    ranks = shared.ranks
    modules = [module for _, module in shared.networks.items()]
    if shared.losses.return_statistics is not None:
        modules.append(shared.losses.return_statistics)
    for module in modules:
        state = ranks.copy(module.state_dict() if ranks.leads else None)
        with ranks.agreeing():
            if not ranks.leads:
                module.load_state_dict(state)
    for optimizer in shared.optimizers.values():
        _share_optimizer(optimizer.optimizer, ranks)


def _share_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    content = optimizer.state_dict()
    flat = {f"{index}.{key}": x for index, state in content["state"].items() for key, x in state.items()}
    received = ranks.copy(flat if ranks.leads else None)
    with ranks.agreeing():
        if not ranks.leads:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in received.items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**content, "state": state})


def serve(ranks: Ranks) -> str:
    """Compute shares of rank 0's updates until it ends.

    Returns:
        str: the status with which its run ended.

    Raises:
        RankFault: if it or another rank is gone.
    """
    shared: SharedExecutor | None = None
    with _signals_ignored():
        while ranks.ended is None:
            command = ranks.hear()
            if "start" in command:
                shared = follow_start(command, ranks)
            elif shared is not None and "update" in command:
                shared.follow(command)
    return ranks.ended


def own_device(kind: str, local_rank: int) -> torch.device:
    """This rank's device: of a node's GPUs the one with its number, or the only one that it sees.

    Raises:
        ConfigurationError: if there are fewer GPUs than ranks.
    """
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if count == 0 or local_rank >= count > 1:
        raise ConfigurationError(f"Rank {local_rank} of this node needs a GPU of its own; PyTorch sees {count}.")
    return torch.device("cuda", local_rank if count > 1 else 0)


def made_of(kind: type[AnyDataclass], values: Mapping[str, Any]) -> AnyDataclass:
    """The dataclass whose ``asdict`` gives ``values``."""
    hints = get_type_hints(kind)
    made = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value, hint = values[field.name], hints[field.name]
        made[field.name] = made_of(hint, value) if isinstance(hint, type) and is_dataclass(hint) else value
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
