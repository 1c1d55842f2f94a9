"""Prediction of a run's memory from its configuration: on the compute device, in RAM, in the page cache and on disk."""

from __future__ import annotations

import copy
import ctypes
from dataclasses import dataclass, replace
from typing import Any

from pwm_torchrl.algorithm.base import Update, find_algorithm
from pwm_torchrl.algorithm.cost import evaluations_per_epoch, will_compile
from pwm_torchrl.config import NETWORKS, Config, micro_batch_key
from pwm_torchrl.memory.readings import GIB, MIB, format_bytes, read_process
from pwm_torchrl.memory.storage import (
    published_store_bytes,
    record_bytes,
    replay_bytes,
    replay_disk_bytes,
    steps_since_checkpoint,
    store_bytes,
)
from pwm_torchrl.memory.trace import Transient, UpdateTracer

#: malloc allocates blocks of at least this many bytes with mmap, so that freeing them returns them to the kernel.
MMAP_THRESHOLD = 64 * 1024
#: An update that needs less than this many bytes is faster with the usual heap, whose fragmentation then costs little.
TRIM_THRESHOLD = 128 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_memory() -> bool:
    """Make the C library return freed memory to the kernel, for the rest of this process.

    Returns:
        bool: ``False`` if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))


HOST, DEVICE, CACHE, DISK = "host", "device", "page cache", "disk"

# Estimates, each measured once and small compared with the tolerance of a prediction.
FRAMEWORK_BYTES = 450 * MIB  # a process that has imported PyTorch, TorchRL and a simulator, if it cannot be measured
CUDA_HOST_BYTES = 2 * GIB  # host memory of the CUDA libraries (unverified)
LIBRARY_BYTES = 40 * MIB  # buffers of the math libraries and fragmentation of the C library's heap
COMPILER_BYTES = 400 * MIB  # 80 MiB that torch.compile keeps; the C++ compiler takes the rest for seconds
ENVIRONMENT_BYTES = MIB // 2  # state and model of one simulator


@dataclass(frozen=True)
class Choices:
    """The settings that a plan decides. None of them changes the result of a run, up to rounding."""

    model_micro_batch: int | None = None
    actor_micro_batch: int | None = None
    critic_micro_batch: int | None = None
    checkpoint_substeps: bool = False
    replay_storage: str = "memory"

    def micro_batch(self, update: str) -> int | None:
        """Rows per backward pass of an update; ``None`` for the whole batch at once."""
        size: int | None = getattr(self, micro_batch_key(update))
        return size

    def with_micro_batch(self, update: str, size: int | None) -> Choices:
        """A copy with another micro-batch size for one update."""
        changed: dict[str, Any] = {micro_batch_key(update): size}
        return replace(self, **changed)


@dataclass(frozen=True)
class Item:
    """One line of a prediction."""

    what: str
    bytes: int
    place: str  # host | device | page cache | disk
    why: str
    shared: bool = False  # one of several that are never needed at the same time: only the largest counts


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of a run.

    Attributes:
        items (tuple of Item): everything that takes memory.
        compute (str): location of the networks: ``"host"`` or ``"device"``.
        verified (bool): whether predictions have been compared with measurements on this kind of device.
        base (int): host bytes that the process holds before it builds anything; part of the host's total.
        recomputes (bool): whether substeps are recomputed in the backward pass.
        updates (tuple of Update): the updates of an epoch.
        evaluations (int): calls of the dynamics network per epoch.
        operations (float): floating-point operations of the updates per epoch.
    """

    items: tuple[Item, ...]
    compute: str
    verified: bool
    base: int
    recomputes: bool = False
    updates: tuple[Update, ...] = ()
    evaluations: int = 0
    operations: float = 0.0

    def total(self, place: str) -> int:
        """Peak bytes in one place."""
        here = [item for item in self.items if item.place == place]
        shared = [item.bytes for item in here if item.shared]
        return sum(item.bytes for item in here if not item.shared) + max(shared, default=0)

    @property
    def growth(self) -> int:
        """Peak host memory above :attr:`base`."""
        return self.total(HOST) - self.base

    @property
    def returns_freed_memory(self) -> bool:
        """Whether updates on the host are so large that the C library should return freed blocks to the kernel."""
        # Recomputation fragments the heap more: it allocates and frees most of its memory many times per update.
        enough = TRIM_THRESHOLD // 8 if self.recomputes else TRIM_THRESHOLD
        updates = [item for item in self.items if item.what in (f"{name} update" for name in NETWORKS)]
        return self.compute == HOST and any(item.bytes > enough for item in updates)

    def as_dict(self) -> dict[str, Any]:
        """Contents as JSON-compatible values."""
        return {
            "items": [vars(item) for item in self.items],
            "totals": {place: self.total(place) for place in (HOST, DEVICE, CACHE, DISK)},
            "compute": self.compute,
            "verified": self.verified,
            "base": self.base,
        }


#: Memory of a process before it builds anything, and its source, if it cannot be measured.
FRAMEWORK_ESTIMATE = (FRAMEWORK_BYTES, "estimate for PyTorch, TorchRL and a simulator")


def framework_bytes() -> tuple[int, str]:
    """Anonymous and shared memory of this process, which has imported everything, and a description of the source."""
    process = read_process()
    if process is None:
        return FRAMEWORK_ESTIMATE
    return process.anon + process.shmem, "measured in this process, which has imported them"


def predict(
    cfg: Config,
    facts: Any,
    choices: Choices,
    compute: str = HOST,
    tracer: UpdateTracer | None = None,
    framework: tuple[int, str] | None = None,
) -> Prediction:
    """Predict a run's memory.

    Args:
        cfg (Config): the run's configuration.
        facts (EnvInfo): its environment's dimensions and number.
        choices (Choices): micro-batches, recomputation and location of the replay buffer.
        compute (str): location of the networks, ``"host"`` or ``"device"``. Defaults to ``"host"``.
        tracer (UpdateTracer, optional): a tracer of the same configuration and ``checkpoint_substeps``, to reuse its
            traces. Defaults to a new one.
        framework (tuple, optional): result of :func:`framework_bytes`. Defaults to calling it now.
    """
    if tracer is None:
        cfg = copy.deepcopy(cfg)
        cfg.model.dynamics.checkpoint_substeps = choices.checkpoint_substeps
        tracer = UpdateTracer(cfg, facts)
    base, known = framework or framework_bytes()
    kept = tracer.persistent
    items = [
        Item("Python and libraries", base, HOST, known),
        Item("parameters", kept.parameters, compute, _networks(tracer)),
        Item("optimizer state", kept.optimizer, compute, "Adam's two moments"),
        Item(
            "undo copies", kept.undo, compute, "weights and optimizer state, to retry an update that ran out of memory"
        ),
    ]
    updates = {name: tracer.transient(name, choices.micro_batch(name)) for name in tracer.updates}
    for name, update in updates.items():
        items.append(Item(f"{name} update", update.peak, compute, _why(update, name, choices, tracer), shared=True))
    if compute == HOST:
        items.append(Item("library buffers", LIBRARY_BYTES, HOST, "math libraries and allocator (estimate)"))
    else:
        items.append(Item("CUDA libraries", CUDA_HOST_BYTES, HOST, "kernels and context on the host (estimate)"))
        if choices.replay_storage != "device" and "model" in updates:
            sampled = updates["model"].data
            items.append(
                Item("pinned buffer", 2 * sampled, HOST, "the sampled batch and its pinned copy for the transfer")
            )
    if will_compile(cfg):
        items.append(Item("compiler", COMPILER_BYTES, HOST, "torch.compile and the C++ compiler (estimate)"))
    items += _environments(cfg, facts)
    if not find_algorithm(cfg.algorithm.name).simulates:
        items += _replay(cfg, facts, choices, compute)
    checkpoints = cfg.training.keep_checkpoints + 2  # plus the best one and the one being written
    saved = kept.parameters + kept.optimizer
    items.append(
        Item("checkpoints", checkpoints * saved, DISK, f"up to {checkpoints} with weights and optimizer state")
    )
    return Prediction(
        tuple(items),
        compute,
        compute == HOST,
        base,
        choices.checkpoint_substeps,
        tuple(tracer.updates.values()),
        evaluations_per_epoch(cfg),
        tracer.operations,
    )


def _why(update: Transient, name: str, choices: Choices, tracer: UpdateTracer) -> str:
    batch = tracer.batches[name]
    size = choices.micro_batch(name) or batch
    split = f"{batch} {tracer.updates[name].rows}" + (f" in micro-batches of {size}" if size < batch else " at once")
    recomputed = ", substeps recomputed" if choices.checkpoint_substeps and name != "critic" else ""
    return (
        f"{split}{recomputed}: activations {format_bytes(update.activations)}, gradients "
        f"{format_bytes(update.gradients)}, data {format_bytes(update.data)}"
    )


def _networks(tracer: UpdateTracer) -> str:
    return ", ".join(name if name in tracer.updates else f"{name} (frozen)" for name in tracer.networks)


def _environments(cfg: Config, facts: Any) -> list[Item]:
    a = cfg.algorithm
    if cfg.mode != "online":
        count = cfg.training.eval_episodes if cfg.mode == "extract" else 0
        return [Item("environments", count * ENVIRONMENT_BYTES, HOST, f"{count} in this process (estimate)")]
    count = facts.num_envs + max(1, cfg.training.eval_episodes)
    if find_algorithm(cfg.algorithm.name).simulates:
        return [Item("environments", count * ENVIRONMENT_BYTES, HOST, f"{count} in this process (estimate)")]
    steps = a.steps_per_env
    batch = 3 * facts.num_envs * steps * record_bytes(facts.observation_dim, facts.action_dim)
    return [
        Item("environments", count * ENVIRONMENT_BYTES, HOST, f"{count} in this process, no workers (estimate)"),
        Item("collected batch", batch, HOST, f"{facts.num_envs} environments x {steps} steps, before they are stored"),
    ]


def _replay(cfg: Config, facts: Any, choices: Choices, compute: str) -> list[Item]:
    a, t = cfg.algorithm, cfg.training
    if cfg.mode != "online":
        return _stored_episodes(cfg, facts)
    size = replay_bytes(facts.observation_dim, facts.action_dim, t.replay_capacity, facts.num_envs)
    what = f"{t.replay_capacity:,} transitions"
    if choices.replay_storage == "disk":
        steps = steps_since_checkpoint(t.epochs, a.steps_per_env, t.checkpoint_every, t.keep_checkpoints)
        files = replay_disk_bytes(facts.observation_dim, facts.action_dim, t.replay_capacity, facts.num_envs, steps)
        return [
            Item("replay", files, DISK, f"{what}, plus those since the oldest checkpoint"),
            Item("replay", files, CACHE, "pages that the kernel reclaims when memory is needed"),
        ]
    place = compute if choices.replay_storage == "device" else HOST
    return [
        Item("replay", size, place, what),
        Item("copy of the replay", size, HOST, "while a checkpoint is written", shared=True),
        Item("replay in checkpoints", (t.keep_checkpoints + 2) * size, DISK, "each checkpoint holds a copy"),
    ]


def _stored_episodes(cfg: Config, facts: Any) -> list[Item]:
    if cfg.data.path is None:  # a plan without the data
        expected = published_store_bytes(cfg.tasks, facts.observation_dim, facts.action_dim)
        what = f"{cfg.tasks}'s published data; data.path is not set (estimate)"
        return [Item("stored episodes", expected, place, what) for place in (DISK, CACHE) if expected]
    files, index = store_bytes(cfg.data.path)
    return [
        Item("stored episodes", files, CACHE, "pages that the kernel reclaims when memory is needed"),
        Item("index of episodes", index, HOST, "start, length and task of each episode"),
    ]
