"""Updates that run out of memory where and when a test says."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import Bench, assert_equal, config

from pwm_torchrl.algorithm.base import MetricRow

UPDATES = ("model", "actor", "critic")
#: Rows of each update's batch in ``config()``.
BATCH = {"model": 8, "actor": 8, "critic": 16}
ERRORS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
    "mapping": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
}
#: Where an update may fail; sampling is a part of the model update only.
PLACES = ("sampling", "forward", "backward", "clipping", "copying", "before the step", "in the step")


class Fault:
    """Raises ``times`` times at one place of an update, after it has drawn random numbers.

    Args:
        bench (Bench): whose update fails.
        update (str): which one.
        place (str): where.
        error (callable): makes the error.
        times (int): how often; then the update goes through.
        seen (callable): called just before the error is raised.
    """

    def __init__(
        self,
        bench: Bench,
        update: str,
        place: str,
        error: Callable[[], Exception],
        times: int = 1,
        seen: Callable[[], None] = lambda: None,
    ) -> None:
        self.bench, self.update, self.place = bench, update, place
        self.error, self.left, self.seen = error, times, seen
        self.raised = 0
        self.begun = False
        self.optimizer = bench.optimizers[update]
        self.network = dict(bench.networks.items())[update]

    def fire(self) -> None:
        if self.left and self.begun:
            self.left -= 1
            self.raised += 1
            torch.rand(3)
            self.seen()
            raise self.error()

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Inside, the update fails."""
        undo = self.bench.algorithm.updates.executor.undo[self.update]
        note = undo.note

        def begin() -> None:
            self.begun = True
            note()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(undo, "note", begin)
            handles = getattr(self, "_" + self.place.replace(" ", "_"))(patch) or []
            yield
            for handle in handles:
                handle.remove()
        assert not self.left, "the fault was never reached"

    def _sampling(self, patch: pytest.MonkeyPatch) -> None:
        sample = self.bench.replay.sample_slices
        patch.setattr(self.bench.replay, "sample_slices", lambda count: (sample(count), self.fire())[0])

    def _layers(self) -> list[nn.Module]:
        return [module for module in self.network.modules() if isinstance(module, nn.Linear)] or [self.network]

    def _forward(self, patch: pytest.MonkeyPatch) -> list[Any]:
        """In the middle of it: when the last layer is used."""
        return [self._layers()[-1].register_forward_hook(lambda module, args, out: self.fire())]

    def _backward(self, patch: pytest.MonkeyPatch) -> list[Any]:
        """When the gradient reaches the first layer that has one."""

        def watch(module: nn.Module, args: Any, out: Tensor) -> None:
            if torch.is_grad_enabled() and out.requires_grad:
                out.register_hook(lambda gradient: self.fire())

        return [self._layers()[0].register_forward_hook(watch)]

    def _clipping(self, patch: pytest.MonkeyPatch) -> None:
        clip = nn.utils.clip_grad_norm_
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *args: (clip(*args), self.fire())[0])

    def _copying(self, patch: pytest.MonkeyPatch) -> None:
        """The copy with which the step would be taken back."""
        undo = self.bench.algorithm.updates.executor.undo[self.update]
        changed = undo._changed_by_step
        patch.setattr(undo, "_changed_by_step", lambda: (self.fire(), changed())[1])

    def _before_the_step(self, patch: pytest.MonkeyPatch) -> None:
        step = self.optimizer.optimizer.step
        patch.setattr(self.optimizer.optimizer, "step", lambda: (self.fire(), step())[1])

    def _in_the_step(self, patch: pytest.MonkeyPatch) -> None:
        """Half of the weights are changed; of one more, the first step has made only a part of the state."""
        optimizer, step = self.optimizer.optimizer, self.optimizer.optimizer.step

        def half() -> Any:
            if not self.left:  # the update is tried again
                return step()
            group = optimizer.param_groups[0]
            parameters = group["params"]
            group["params"] = parameters[: len(parameters) // 2]
            step()
            group["params"] = parameters
            optimizer.state[parameters[-1]].setdefault("step", torch.zeros(()))
            return self.fire()

        patch.setattr(optimizer, "step", half)


def make_bench(changes: dict[str, Any] | None = None, data: Any = None, epochs: int = 0) -> Bench:
    """An algorithm of which every random number is known, after some epochs."""
    few = {"algorithm.first_model_updates": 1, "algorithm.model_updates": 1, "algorithm.critic_passes": 1}
    bench = Bench(config({**few, **(changes or {})}), data)
    torch.manual_seed(11)
    for _ in range(epochs):
        bench.step()
    return bench


def prepared(bench: Bench, update: str) -> Callable[[MetricRow], object]:
    """An update with its inputs, drawn from fixed random numbers."""
    torch.manual_seed(12)
    algorithm = bench.algorithm
    if update == "model":
        return algorithm.update_model
    observation = bench.replay.sample_observations(algorithm.cfg.actor_batch)
    if update == "actor":
        return lambda row: algorithm.update_actor(observation, row)
    imagined = bench.losses.actor.rollout_and_loss(algorithm.encode(observation))[1]
    return lambda row: bench.update_critic(imagined, row)


def do(bench: Bench, update: str) -> dict[str, float]:
    """One update, and what it logs; notes where it leaves the generator."""
    call, row = prepared(bench, update), MetricRow()
    try:
        call(row)
    finally:
        bench.generator = torch.get_rng_state()
    return row.numbers()


def state_of(bench: Bench) -> dict[str, Tensor]:
    """Everything that an update may change, and where it left the generator."""
    out = {"generator": bench.generator}
    for name, network in bench.networks.items():
        out |= {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}
    for name, optimizer in bench.optimizers.items():
        for index, state in optimizer.optimizer.state_dict()["state"].items():
            out |= {f"optimizer_{name}.{index}.{key}": value.clone() for key, value in state.items()}
        assert all(p.grad is None for p in optimizer.parameters)
    for key, value in bench.losses.actor.return_statistics.state_dict().items():
        out[f"return_statistics.{key}"] = value.clone()
    return out


def assert_same_run(ours: Bench, theirs: Bench) -> None:
    """Equal to the bit now and after another epoch of each."""
    first, second = [], []
    for bench, ends in ((ours, first), (theirs, second)):
        ends.append(state_of(bench))
        torch.manual_seed(13)
        ends.append(bench.step())
        bench.generator = torch.get_rng_state()
        ends.append(state_of(bench))
    assert_equal(first[0], second[0])
    assert first[1] == second[1]
    assert_equal(first[2], second[2])
