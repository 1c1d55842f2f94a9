"""How one update is carried out: in micro-batches, and again in smaller ones where memory runs out.

An update that runs out of memory is undone, to the bit, and repeated with half the micro-batch. What an algorithm hands
in is a function that makes the update's batch, so that a repetition draws the same numbers again.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from pwm_torchrl.algorithm.build import Losses, NetworkOptimizer
from pwm_torchrl.config import NETWORKS, MemoryConfig, micro_batch_key
from pwm_torchrl.errors import OutOfMemory, RankFault

Result = TypeVar("Result")
Metrics = dict[str, Tensor]

#: Parts of the messages of errors by which PyTorch and its libraries tell that an allocation was refused.
REFUSALS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER
    "calling `cublasCreate(handle)`",  # cuBLAS says that it is not initialized when its workspace does not fit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, on the host or on a device; also where that is the cause of an error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RankFault):  # another process died, so the update cannot be retried
            return False
        if isinstance(link, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in REFUSALS):
            return True
        link = link.__cause__
    return False


class Executor(Protocol):
    """Makes one update with a batch: back-propagates it in micro-batches of ``size`` rows, and steps."""

    @property
    def undo(self) -> Mapping[str, Undo]:
        """What undoes an update, by its name."""

    def largest_share(self, batch: int) -> int:
        """Rows of a batch that one process has at most."""

    def model(self, slices: TensorDictBase, size: int) -> tuple[Metrics, Tensor, Tensor]:
        """Model update on slices ``[B, H]``: losses, fraction of valid steps, gradient norm."""

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update from start latents ``[B]``: losses, detached rollouts ``[B, H]``, gradient norm."""

    def critic(self, states: TensorDictBase, size: int) -> tuple[Metrics, Tensor]:
        """Critic update on states ``[S]``: losses, gradient norm."""


class LocalExecutor:
    """Makes updates in this process alone.

    Args:
        losses (Losses): the objectives.
        optimizers (dict of NetworkOptimizer): of the networks that are trained, by their names.
    """

    def __init__(self, losses: Losses, optimizers: Mapping[str, NetworkOptimizer]) -> None:
        self.losses, self.optimizers = losses, optimizers
        self.undo = undo_of(optimizers, losses.return_statistics)

    def largest_share(self, batch: int) -> int:
        """All of it."""
        return batch

    def model(self, slices: TensorDictBase, size: int) -> tuple[Metrics, Tensor, Tensor]:
        """Model update on slices ``[B, H]``: losses, fraction of valid steps, gradient norm."""
        follow_unit(self.losses)
        read = self.losses.model.read(slices)
        losses = self.losses.model.backward(read, size)
        return losses, read.valid.float().mean(), self._step("model")

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update from start latents ``[B]``: losses, detached rollouts ``[B, H]``, gradient norm."""
        losses, rollouts = self.losses.actor.backward(start, size)
        return losses, rollouts, self._step("actor")

    def critic(self, states: TensorDictBase, size: int) -> tuple[Metrics, Tensor]:
        """Critic update on states ``[S]``: losses, gradient norm."""
        follow_unit(self.losses)
        losses = self.losses.critic.backward(states, size)
        return losses, self._step("critic")

    def _step(self, name: str) -> Tensor:
        return self.optimizers[name].step(self.undo[name].before_step)


class Updates:
    """Carries out updates; their micro-batches only ever become smaller while a run lasts.

    Args:
        executor (Executor): makes an update with a batch.
        memory (MemoryConfig): the micro-batches to begin with; ``None``: whole batches.
        on_reduction (callable): called with (update, refused size, next size, error message) after each reduction.

    Attributes:
        made (int): updates so far, in this process's life.
        around (callable, optional): gives, of an update's name, the context that it is made in, such as a profiler's
            range. ``None``: none.
    """

    def __init__(
        self, executor: Executor, memory: MemoryConfig, on_reduction: Callable[[str, int, int, str], None]
    ) -> None:
        self.executor = executor
        self.sizes: dict[str, int | None] = {name: getattr(memory, micro_batch_key(name)) for name in NETWORKS}
        self.reduced: dict[str, int] = {}
        self.used: dict[str, int] = {}  # by each update's last success
        self.on_reduction = on_reduction
        self.made = 0
        self.around: Callable[[str], AbstractContextManager[None]] | None = None

    def model(self, slices: Callable[[], TensorDictBase], rows: int) -> tuple[Metrics, Tensor, Tensor]:
        """Model update on ``rows`` slices; see :class:`Executor`."""
        return self.run("model", rows, lambda size: self.executor.model(slices(), size))

    def actor(self, start: Callable[[], TensorDictBase], rows: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update from ``rows`` start latents; see :class:`Executor`."""
        return self.run("actor", rows, lambda size: self.executor.actor(start(), size))

    def critic(self, states: Callable[[], TensorDictBase], rows: int) -> tuple[Metrics, Tensor]:
        """Critic update on ``rows`` states; see :class:`Executor`."""
        return self.run("critic", rows, lambda size: self.executor.critic(states(), size))

    def size(self, update: str, rows: int) -> int:
        """Rows per backward pass of an update on a batch of ``rows``, in each process that has a share of it."""
        return self.limit(update, self.executor.largest_share(rows))

    def limit(self, update: str, rows: int) -> int:
        """Of ``rows``, as many as memory was planned for at a time."""
        limits = (self.sizes[update], self.reduced.get(update), rows)
        return max(1, min(limit for limit in limits if limit is not None))

    def run(self, update: str, rows: int, attempt: Callable[[int], Result]) -> Result:
        """Call ``attempt`` with the update's micro-batch, again with half of it each time memory is refused.

        A smaller size is kept once an update has succeeded with it.

        Raises:
            OutOfMemory: if memory is refused at micro-batch 1; everything is as it was before the update.
        """
        if self.around is None:
            return self._run(update, rows, attempt)
        with self.around(update):
            return self._run(update, rows, attempt)

    def _run(self, update: str, rows: int, attempt: Callable[[int], Result]) -> Result:
        undo = self.executor.undo[update]
        first = size = self.size(update, rows)
        while True:
            undo.note()
            try:
                result = attempt(size)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                message = " ".join(str(error).split())[:300] or type(error).__name__
            else:
                self.used[update] = size
                if size < first:
                    self.reduced[update] = size
                self.made += 1
                return result
            # Out of the handler: the error's traceback no longer holds the frames with the update's tensors.
            undo.restore()
            if size == 1:
                raise OutOfMemory(
                    f"The {update} update does not fit into memory even with a micro-batch of 1 ({message}). Give the "
                    "run more memory, a smaller model (size=...) or model.dynamics.checkpoint_substeps=true."
                )
            refused, size = size, -(-size // 2)
            self.on_reduction(update, refused, size, message)

    def metrics(self) -> dict[str, int]:
        """The sizes in use, under the names of their keys."""
        return {f"memory/{micro_batch_key(update)}": size for update, size in self.used.items()}

    def state_dict(self) -> dict[str, Any]:
        """The reduced sizes, and those from which they were reduced."""
        return {"sizes": dict(self.sizes), "reduced": dict(self.reduced)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with reduced sizes, except of updates whose size was set anew since: there is other memory now."""
        self.reduced = {
            update: size
            for update, size in state_dict["reduced"].items()
            if state_dict["sizes"][update] == self.sizes[update]
        }


def follow_unit(losses: Losses) -> None:
    """Let reward head and critics compute in the present unit of rewards; what they predict does not change."""
    model = losses.model
    if model is None or model.world_model.reward_deviation is None:
        return
    model.world_model.rescale()
    if losses.critic is not None:
        losses.critic.critics.rescale(model.world_model.reward_deviation.value)


def undo_of(optimizers: Mapping[str, NetworkOptimizer], return_statistics: nn.Module | None) -> dict[str, Undo]:
    """Undoes an update of each network; the actor's changes the return statistics, too."""
    changed = [] if return_statistics is None else [return_statistics]
    return {name: Undo(optimizer, changed if name == "actor" else []) for name, optimizer in optimizers.items()}


class Undo:
    """Undoes an unfinished update: weights, optimizer state, generators and running statistics.

    Gradient accumulation changes none of the weights, so their copy is taken by :meth:`before_step`, just before the
    optimizer changes them; into buffers that stay, since this is done at every update. They are as large as the weights
    and the optimizer's state.

    Args:
        optimizer (NetworkOptimizer): whose parameters and state the update changes.
        statistics (sequence of nn.Module): modules whose buffers the update changes.
    """

    def __init__(self, optimizer: NetworkOptimizer, statistics: Sequence[nn.Module] = ()) -> None:
        self.optimizer = optimizer
        self.statistics = statistics
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._with_state: set[nn.Parameter] = set()
        self._stepping = False
        self._host_generator: Tensor | None = None
        self._generators: list[tuple[torch.device, Tensor]] = []
        self._devices = {p.device for p in optimizer.parameters if p.device.type == "cuda"}

    def _live_buffers(self) -> list[Tensor]:
        return [buffer for module in self.statistics for buffer in module.buffers()]

    def _changed_by_step(self) -> list[Tensor]:
        """Weights, and the optimizer's tensors of those that have any."""
        state = self.optimizer.optimizer.state
        tensors: list[Tensor] = [p.data for p in self.optimizer.parameters]
        for parameter in self.optimizer.parameters:
            tensors += [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
        return tensors

    def note(self) -> None:
        """An update begins."""
        self._stepping = False
        self._host_generator = torch.get_rng_state()
        self._generators = [(device, torch.cuda.get_rng_state(device)) for device in self._devices]
        self._buffers = [buffer.clone() for buffer in self._live_buffers()]

    @torch.no_grad()
    def before_step(self) -> None:
        """The optimizer is about to change the weights."""
        tensors = self._changed_by_step()
        if len(self._copies) != len(tensors):  # the optimizer makes its state in its first step
            self._copies = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(self._copies, tensors)
        self._with_state = {p for p in self.optimizer.parameters if p in self.optimizer.optimizer.state}
        self._stepping = True

    @torch.no_grad()
    def restore(self) -> None:
        """Everything is as it was when the update began, gradients cleared, and unused memory is given back."""
        optimizer = self.optimizer.optimizer
        optimizer.zero_grad(set_to_none=True)
        # Autograd holds on to the rest of a backward pass that failed until the thread's next one begins.
        torch.zeros((), requires_grad=True).backward()
        gc.collect()
        if self._stepping:
            for parameter in self.optimizer.parameters:
                if parameter not in self._with_state:  # its state was begun by the failed step, whole or in part
                    optimizer.state.pop(parameter, None)
            torch._foreach_copy_(self._changed_by_step(), self._copies)
        for buffer, copy in zip(self._live_buffers(), self._buffers, strict=True):
            buffer.copy_(copy)
        if self._host_generator is not None:
            torch.set_rng_state(self._host_generator)
        for device, state in self._generators:
            torch.cuda.set_rng_state(state, device)
        if self._devices:
            torch.cuda.empty_cache()
