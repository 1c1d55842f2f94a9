"""Carries out updates in micro-batches, and retries with smaller ones when memory runs out.

An update that runs out of memory is undone exactly and retried with half the micro-batch. The algorithm passes a
function that makes the update's batch, so that a retry draws the same random numbers again.
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

#: Substrings of the error messages of PyTorch and its libraries when an allocation fails.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER
    "calling `cublasCreate(handle)`",  # cuBLAS says that it is not initialized when its workspace does not fit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one in its chain of causes, is a failed allocation on the host or a device."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RankFault):  # another process died, so the update cannot be retried
            return False
        if isinstance(link, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in OUT_OF_MEMORY_MESSAGES):
            return True
        link = link.__cause__
    return False


class Executor(Protocol):
    """Makes one update: back-propagates a batch in micro-batches of ``size`` rows, and takes an optimizer step."""

    @property
    def undo(self) -> Mapping[str, Undo]:
        """The :class:`Undo` of each update, by name."""

    def largest_share(self, batch: int) -> int:
        """The most rows of a batch that any process gets."""

    def model(self, slices: TensorDictBase, size: int) -> tuple[Metrics, Tensor, Tensor]:
        """Model update on slices ``[B, H]``: losses, fraction of valid steps, gradient norm."""

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update from start latents ``[B]``: losses, detached rollouts ``[B, H]``, gradient norm."""

    def critic(self, states: TensorDictBase, size: int) -> tuple[Metrics, Tensor]:
        """Critic update on states ``[S]``: losses, gradient norm."""


class LocalExecutor:
    """Makes updates in this process only.

    Args:
        losses (Losses): the objectives.
        optimizers (dict of NetworkOptimizer): one per trained network, by name.
    """

    def __init__(self, losses: Losses, optimizers: Mapping[str, NetworkOptimizer]) -> None:
        self.losses, self.optimizers = losses, optimizers
        self.undo = make_undos(optimizers, losses.return_statistics)

    def largest_share(self, batch: int) -> int:
        """The whole batch."""
        return batch

    def model(self, slices: TensorDictBase, size: int) -> tuple[Metrics, Tensor, Tensor]:
        """Model update on slices ``[B, H]``: losses, fraction of valid steps, gradient norm."""
        rescale_to_reward_unit(self.losses)
        read = self.losses.model.read(slices)
        losses = self.losses.model.backward(read, size)
        return losses, read.valid.float().mean(), self._step("model")

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update from start latents ``[B]``: losses, detached rollouts ``[B, H]``, gradient norm."""
        losses, rollouts = self.losses.actor.backward(start, size)
        return losses, rollouts, self._step("actor")

    def critic(self, states: TensorDictBase, size: int) -> tuple[Metrics, Tensor]:
        """Critic update on states ``[S]``: losses, gradient norm."""
        rescale_to_reward_unit(self.losses)
        losses = self.losses.critic.backward(states, size)
        return losses, self._step("critic")

    def _step(self, name: str) -> Tensor:
        return self.optimizers[name].step(self.undo[name].before_step)


class Updates:
    """Carries out updates; during a run, their micro-batches only shrink.

    Args:
        executor (Executor): makes one update with a batch.
        memory (MemoryConfig): the initial micro-batches; ``None`` in it stands for the whole batch.
        on_reduction (callable): called with (update, refused size, next size, error message) at each reduction.

    Attributes:
        made (int): updates so far in this process.
        around (callable, optional): maps an update's name to a context manager that is entered around the update, such
            as a profiler range.
    """

    def __init__(
        self, executor: Executor, memory: MemoryConfig, on_reduction: Callable[[str, int, int, str], None]
    ) -> None:
        self.executor = executor
        self.sizes: dict[str, int | None] = {name: getattr(memory, micro_batch_key(name)) for name in NETWORKS}
        self.reduced: dict[str, int] = {}
        self.used: dict[str, int] = {}  # micro-batch of each update's last success
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
        """Rows per backward pass, in each process, of an update on a batch of ``rows``."""
        return self.limit(update, self.executor.largest_share(rows))

    def limit(self, update: str, rows: int) -> int:
        """``rows``, limited by the configured and by the reduced micro-batch."""
        limits = (self.sizes[update], self.reduced.get(update), rows)
        return max(1, min(limit for limit in limits if limit is not None))

    def run(self, update: str, rows: int, attempt: Callable[[int], Result]) -> Result:
        """Call ``attempt`` with the update's micro-batch; halve it and retry each time an allocation fails.

        A smaller size is kept once an update has succeeded with it.

        Raises:
            OutOfMemory: if an allocation fails at micro-batch 1; the state before the update is restored.
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
            # Outside the handler, because the error's traceback keeps the frames with the update's tensors alive.
            undo.restore()
            if size == 1:
                raise OutOfMemory(
                    f"The {update} update does not fit into memory even with a micro-batch of 1 ({message}). Give the "
                    "run more memory, a smaller model (size=...) or model.dynamics.checkpoint_substeps=true."
                )
            refused, size = size, -(-size // 2)
            self.on_reduction(update, refused, size, message)

    def metrics(self) -> dict[str, int]:
        """The micro-batches in use, as metrics named after their config keys."""
        return {f"memory/{micro_batch_key(update)}": size for update, size in self.used.items()}

    def state_dict(self) -> dict[str, Any]:
        """The reduced micro-batches, and the configured ones."""
        return {"sizes": dict(self.sizes), "reduced": dict(self.reduced)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore reduced micro-batches, except where the configured one has changed: memory may differ now."""
        self.reduced = {
            update: size
            for update, size in state_dict["reduced"].items()
            if state_dict["sizes"][update] == self.sizes[update]
        }


def rescale_to_reward_unit(losses: Losses) -> None:
    """Rescale reward head and critics to the current reward unit; their predictions do not change."""
    model = losses.model
    if model is None or model.world_model.reward_deviation is None:
        return
    model.world_model.rescale()
    if losses.critic is not None:
        losses.critic.critics.rescale(model.world_model.reward_deviation.value)


def make_undos(optimizers: Mapping[str, NetworkOptimizer], return_statistics: nn.Module | None) -> dict[str, Undo]:
    """An :class:`Undo` for each network; the actor's covers the return statistics, which its update changes, too."""
    changed = [] if return_statistics is None else [return_statistics]
    return {name: Undo(optimizer, changed if name == "actor" else []) for name, optimizer in optimizers.items()}


class Undo:
    """Undoes an unfinished update: restores weights, optimizer state, random generators and running statistics.

    Gradient accumulation does not change the weights, so :meth:`before_step` copies them just before the optimizer
    does. The copies go into buffers that are reused by every update, as large as the weights and the optimizer's state.

    Args:
        optimizer (NetworkOptimizer): the optimizer whose parameters and state the update changes.
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
        """The weights and the optimizer's state tensors."""
        state = self.optimizer.optimizer.state
        tensors: list[Tensor] = [p.data for p in self.optimizer.parameters]
        for parameter in self.optimizer.parameters:
            tensors += [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
        return tensors

    def note(self) -> None:
        """Call when an update begins: save random generators and statistics."""
        self._stepping = False
        self._host_generator = torch.get_rng_state()
        self._generators = [(device, torch.cuda.get_rng_state(device)) for device in self._devices]
        self._buffers = [buffer.clone() for buffer in self._live_buffers()]

    @torch.no_grad()
    def before_step(self) -> None:
        """Call just before the optimizer changes the weights: copy them and the optimizer's state."""
        tensors = self._changed_by_step()
        if len(self._copies) != len(tensors):  # the optimizer creates its state in its first step
            self._copies = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(self._copies, tensors)
        self._with_state = {p for p in self.optimizer.parameters if p in self.optimizer.optimizer.state}
        self._stepping = True

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state at the beginning of the update, clear gradients, and release unused memory."""
        optimizer = self.optimizer.optimizer
        optimizer.zero_grad(set_to_none=True)
        # Autograd keeps the rest of a failed backward pass alive until the thread's next backward pass begins.
        torch.zeros((), requires_grad=True).backward()
        gc.collect()
        if self._stepping:
            for parameter in self.optimizer.parameters:
                if parameter not in self._with_state:  # the failed step created its state, perhaps incompletely
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
