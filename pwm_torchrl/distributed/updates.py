"""Updates on a batch that is divided among ranks: each rank back-propagates its rows, and all take the same step.

The result is that of one process with the whole batch. Rank 0 samples the batch and draws its random numbers. Values
that depend on all rows (the number of valid steps, the running variance of returns) are computed from the whole batch.
Gradients are added up before they are divided and clipped.

The other ranks build the same networks, load rank 0's state, and compute shares of its updates until its run ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.base import build_parts
from pwm_torchrl.algorithm.build import EnvFacts, Facts, Losses, NetworkOptimizer, Networks, facts_of
from pwm_torchrl.algorithm.updates import is_out_of_memory, make_undos, rescale_to_reward_unit
from pwm_torchrl.config import Config
from pwm_torchrl.devices import set_precision, set_threads
from pwm_torchrl.distributed.ranks import RankGather, Ranks, RankSum, RemoteOutOfMemory
from pwm_torchrl.errors import ConfigurationError, RankFault
from pwm_torchrl.objectives.actor_loss import Accumulated
from pwm_torchrl.objectives.model_loss import MASK_KEY, FlowNoise

NOISE = "noise"
#: Number of model updates between comparisons of the ranks' weights, in runs without actor updates.
COMPARE_EVERY = 50
#: Integer type by element size, for the checksums.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedExecutor:
    """Executes one rank's part of the updates; an :class:`~pwm_torchrl.algorithm.updates.Executor`.

    Args:
        networks (Networks): the networks, equal on all ranks.
        losses (Losses): their objectives.
        optimizers (dict of NetworkOptimizer): optimizers of the trained networks, by name.
        ranks (Ranks): the processes.
        before_first_update (callable, optional): called once on rank 0 before its first update, to set up the other
            ranks. Defaults to ``None``.
    """

    def __init__(
        self,
        networks: Networks,
        losses: Losses,
        optimizers: Mapping[str, NetworkOptimizer],
        ranks: Ranks,
        before_first_update: Callable[[SharedExecutor], None] | None = None,
    ) -> None:
        self.networks, self.losses, self.optimizers = networks, losses, optimizers
        self.undo = make_undos(optimizers, losses.return_statistics)
        self.ranks = ranks
        self._before_first_update = before_first_update
        self._model_updates = 0

    def largest_share(self, batch: int) -> int:
        """Number of rows of the largest share of a batch."""
        return self.ranks.largest_share(batch)

    def model(self, data: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Model update on slices ``[B, H]``, in micro-batches of ``size`` on every rank; rank 0 only.

        Returns:
            tuple: losses of the batch, fraction of valid steps and gradient norm.
        """
        loss = self.losses.model
        slices = loss.read(data)
        noise, (per_step, overall) = loss.draw_noise(slices), slices.valid_counts()
        rows = data.select(*loss.in_keys, MASK_KEY, strict=False)
        if noise is not None:
            rows[NOISE] = TensorDict({key: x.transpose(0, 1) for key, x in noise._asdict().items()}, data.batch_size)
        common = TensorDict(per_step=per_step, overall=overall)
        # Collecting updates the running statistics, but only rank 0 collects.
        common["statistics"] = TensorDict(self.networks.model.statistics())
        losses, norm = self._model(size, self._send("model", size, rows, common))
        return losses, slices.valid.float().mean(), norm

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update on rollouts from latents ``[B]``; rank 0 only.

        Returns:
            tuple: losses, rollouts ``[B, H]`` and gradient norm.
        """
        loss = self.losses.actor
        rows = start.select(*loss.in_keys)
        noise = loss.draw_noise(start.get(loss.tensor_keys.latent))
        if noise is not None:
            rows[NOISE] = noise.transpose(0, 1)
        return self._actor(size, self._send("actor", size, rows, TensorDict()), len(start))

    def critic(self, states: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Critic update on ``states`` ``[S]``; rank 0 only.

        Returns:
            tuple: losses and gradient norm.
        """
        common = TensorDict(counted=self.losses.critic.counted(states))
        return self._critic(size, self._send("critic", size, states, common), len(states))

    def follow(self, command: Mapping[str, Any]) -> None:
        """Execute this rank's part of rank 0's update, and undo it if any rank ran out of memory."""
        update, size, count = command["update"], command["size"], command["count"]
        undo, optimizer = self.undo[update], self.optimizers[update]
        undo.note()
        for group in optimizer.optimizer.param_groups:
            group["lr"] = command["lr"]
        try:
            payload = self.ranks.receive(command)
            if update == "model":
                self._model(size, payload)
            elif update == "actor":
                self._actor(size, payload, count)
            else:
                self._critic(size, payload, count)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        undo.restore()  # after the handler, because its traceback keeps the update's tensors alive

    def _send(self, update: str, size: int, rows: TensorDictBase, common: TensorDictBase) -> TensorDictBase:
        if self._before_first_update is not None:
            self._before_first_update(self)
            self._before_first_update = None
        lr = self.optimizers[update].optimizer.param_groups[0]["lr"]
        return self.ranks.send({"update": update, "size": size, "lr": lr}, rows, common)

    def _model(self, size: int, payload: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        optimizer, ranks = self.optimizers["model"], self.ranks
        with ranks.all_or_none():
            rows, common = payload["rows"].auto_batch_size_(2), payload["common"]
            noise = rows.get(NOISE, None)
            if not ranks.is_rank_zero:
                for key, buffer in self.networks.model.statistics().items():
                    buffer.copy_(common["statistics", key])
            rescale_to_reward_unit(self.losses)
            losses = self.losses.model.backward(
                self.losses.model.read(rows),
                size,
                noise=None if noise is None else FlowNoise(*(noise[key].transpose(0, 1) for key in FlowNoise._fields)),
                valid_counts=(common["per_step"], common["overall"]),
            )
            total = RankSum(ranks, [*(p.grad for p in optimizer.parameters), *losses.values()])
        finished = self._finish("model", total, losses)
        self._model_updates += 1
        if self._model_updates % COMPARE_EVERY == 0 and self.losses.actor is None:
            ranks.idle = False
            self._compare()
            ranks.idle = True
        return finished

    def _actor(self, size: int, payload: TensorDictBase, count: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        loss, ranks = self.losses.actor, self.ranks
        with ranks.all_or_none():
            rows = payload["rows"].auto_batch_size_(1)
            noise = rows.get(NOISE, None)
            part = loss.accumulate(rows, size, None if noise is None else noise.transpose(0, 1), count)
            returns = part.returns.new_zeros(count, 1)
            returns[ranks.share(count)] = part.returns
            total = RankSum(ranks, [*part.gradients, returns])
            rollouts = RankGather(ranks, part.rollouts, count)
        total.exchange()
        rollouts.exchange()
        with ranks.all_or_none():
            *gradients, whole = total.tensors()
            assert whole is not None
            losses, imagined = loss.finish(Accumulated(gradients, whole, rollouts.whole()))
            norm = self.optimizers["actor"].step(self.undo["actor"].before_step)
        self._compare()  # usually once per epoch
        ranks.idle = True
        return losses, imagined, norm

    def _compare(self) -> None:
        """Check that weights and optimizers are equal on all ranks; the losses would not show a difference."""
        with self.ranks.all_or_none():
            checked = self.checksums()
        self.ranks.require_equal(list(checked), torch.stack(list(checked.values())))

    def _critic(self, size: int, payload: TensorDictBase, count: int) -> tuple[dict[str, Tensor], Tensor]:
        optimizer, ranks = self.optimizers["critic"], self.ranks
        with ranks.all_or_none():
            states = payload["rows"].auto_batch_size_(1)
            rescale_to_reward_unit(self.losses)
            losses = self.losses.critic.backward(states, size, whole=(count, payload["common", "counted"]))
            total = RankSum(ranks, [*(p.grad for p in optimizer.parameters), *losses.values()])
        return self._finish("critic", total, losses)

    def _finish(self, name: str, total: RankSum, losses: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Add up gradients and losses over the ranks, and take the optimizer's step."""
        optimizer = self.optimizers[name]
        total.exchange()
        with self.ranks.all_or_none():
            tensors = total.tensors()
            for parameter, gradient in zip(optimizer.parameters, tensors, strict=False):  # the losses come after them
                parameter.grad = gradient
            whole = {
                key: x for key, x in zip(losses, tensors[len(optimizer.parameters) :], strict=True) if x is not None
            }
            norm = optimizer.step(self.undo[name].before_step)
        self.ranks.idle = True
        return whole, norm

    @torch.no_grad()
    def checksums(self) -> dict[str, Tensor]:
        """Checksums of each network with its optimizer and of the return statistics, see :func:`checksum`."""
        sums = {}
        for name, network in self.networks.items():
            if name not in self.optimizers:
                continue
            state = self.optimizers[name].optimizer.state
            moments = [x for p in self.optimizers[name].parameters for x in state.get(p, {}).values()]
            # Without buffers: only rank 0 updates the observation statistics until the next model update.
            sums[name] = checksum([*network.parameters(), *(x for x in moments if isinstance(x, Tensor))])
        if self.losses.return_statistics is not None:
            sums["return_statistics"] = checksum(list(self.losses.return_statistics.buffers()))
        return sums


def checksum(tensors: list[Tensor]) -> Tensor:
    """Sum of all elements' bits, read as integers. It distinguishes NaNs and ignores the order of elements."""
    device = tensors[0].device
    each = [x.contiguous().view(BITS[x.element_size()]).sum(dtype=torch.int64).to(device) for x in tensors]
    return torch.stack(each).sum()


# The ranks other than 0 -----------------------------------------------------------------------------------------------


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
