"""Running out of memory inside an update: take the update back, halve its micro-batch, repeat it."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pwm_torchrl.errors import OutOfMemory, RankFault
from pwm_torchrl.algorithm.build import Learner
from pwm_torchrl.config import MemoryConfig

Result = TypeVar("Result")

#: The key of :class:`~pwm_torchrl.config.MemoryConfig` that sets each update's micro-batch.
MICRO_BATCH_KEYS = {
    "world-model": "model_micro_batch",
    "policy": "imagination_micro_batch",
    "critic": "critic_micro_batch",
}

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
        if isinstance(link, RankFault):  # whatever its cause, there is nobody left to repeat the update with
            return False
        if isinstance(link, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in REFUSALS):
            return True
        link = link.__cause__
    return False


class MicroBatches:
    """Sizes of the micro-batches of the updates; while a run lasts, they only ever become smaller.

    Args:
        sizes (dict): rows per backward pass by the update's name; ``None``: all at once.
        report (callable): called with (update, refused size, next size, error message) after each reduction.
    """

    def __init__(self, sizes: Mapping[str, int | None], report: Callable[[str, int, int, str], None]) -> None:
        self.sizes = dict(sizes)
        self.reduced: dict[str, int] = {}
        self.used: dict[str, int] = {}  # by each update's last success
        self.report = report

    @classmethod
    def configured(cls, memory: MemoryConfig, report: Callable[[str, int, int, str], None]) -> MicroBatches:
        """Those of a configuration."""
        return cls({update: getattr(memory, key) for update, key in MICRO_BATCH_KEYS.items()}, report)

    def size(self, update: str, batch: int) -> int:
        """Rows per backward pass of an update on ``batch`` rows."""
        limits = (self.sizes[update], self.reduced.get(update), batch)
        return max(1, min(limit for limit in limits if limit is not None))

    def run(self, update: str, batch: int, undo: Undo, attempt: Callable[[int], Result]) -> Result:
        """Call ``attempt`` with the update's micro-batch, again with half of it each time memory is refused.

        A smaller size is kept once an update has succeeded with it.

        Raises:
            OutOfMemory: if memory is refused at micro-batch 1; everything is as it was before the update.
        """
        first = size = self.size(update, batch)
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
                return result
            # Out of the handler: the error's traceback no longer holds the frames with the update's tensors.
            undo.restore()
            if size == 1:
                raise OutOfMemory(
                    f"The {update} update does not fit into memory even with a micro-batch of 1 ({message}). Give the "
                    "run more memory, a smaller model (size=...) or model.dynamics.checkpoint_substeps=true."
                )
            refused, size = size, -(-size // 2)
            self.report(update, refused, size, message)

    def metrics(self) -> dict[str, int]:
        """The sizes in use, under the names of their keys."""
        return {f"memory/{MICRO_BATCH_KEYS[update]}": size for update, size in self.used.items()}

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


def undo_of(learners: Mapping[str, Learner], return_statistics: nn.Module | None) -> dict[str, Undo]:
    """What takes an update of each network back; the policy's changes the return statistics, too."""
    changed = [] if return_statistics is None else [return_statistics]
    return {name: Undo(learner, changed if name == "actor" else []) for name, learner in learners.items()}


class Undo:
    """Takes an unfinished update back: weights, optimizer state, generators and running statistics.

    Gradient accumulation changes none of the weights, so their copy is taken by :meth:`before_step`, just before the
    optimizer changes them; into buffers that stay, since this is done at every update. They are as large as the weights
    and the optimizer's state.

    Args:
        learner (Learner): whose parameters and optimizer the update changes.
        statistics (sequence of nn.Module): modules whose buffers the update changes.
    """

    def __init__(self, learner: Learner, statistics: Sequence[nn.Module] = ()) -> None:
        self.learner = learner
        self.statistics = statistics
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._with_state: set[nn.Parameter] = set()
        self._stepping = False
        self._host_generator: Tensor | None = None
        self._generators: list[tuple[torch.device, Tensor]] = []
        self._devices = {p.device for p in learner.parameters if p.device.type == "cuda"}

    def _live_buffers(self) -> list[Tensor]:
        return [buffer for module in self.statistics for buffer in module.buffers()]

    def _changed_by_step(self) -> list[Tensor]:
        """Weights, and the optimizer's tensors of those that have any."""
        state = self.learner.optimizer.state
        tensors: list[Tensor] = [p.data for p in self.learner.parameters]
        for parameter in self.learner.parameters:
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
        self._with_state = {p for p in self.learner.parameters if p in self.learner.optimizer.state}
        self._stepping = True

    @torch.no_grad()
    def restore(self) -> None:
        """Everything is as it was when the update began, gradients cleared, and unused memory is given back."""
        optimizer = self.learner.optimizer
        optimizer.zero_grad(set_to_none=True)
        # Autograd holds on to the rest of a backward pass that failed until the thread's next one begins.
        torch.zeros((), requires_grad=True).backward()
        gc.collect()
        if self._stepping:
            for parameter in self.learner.parameters:
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
