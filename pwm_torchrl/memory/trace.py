"""Memory of the updates of an epoch, traced with fake tensors, or with real ones where the updates are small.

The trace runs the calls of training: the losses' ``backward``, clipping, the copy for undoing an update, and the
optimizer's step. An operation on fake tensors takes some 0.4 ms at any size; those of a small update are faster on real
tensors, and give the same bytes. If the batch is split into micro-batches, only the last one is run, together with the
tensors that the earlier ones leave behind.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_torchrl.algorithm.base import build_parts, find_algorithm, updates_of
from pwm_torchrl.algorithm.build import EnvFacts
from pwm_torchrl.algorithm.cost import evaluations_of, operations_per_epoch
from pwm_torchrl.algorithm.pwm import PWM, q_targets
from pwm_torchrl.algorithm.updates import Undo
from pwm_torchrl.config import Config
from pwm_torchrl.objectives.imagination import Imagined
from pwm_torchrl.objectives.model_loss import Slices

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all live storages that operations have created, of real or fake tensors.

    Attributes:
        live (int): current bytes.
        peaks (list of int): maximum of ``live`` in each phase since :meth:`begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peaks = [0]
        self._known: dict[int, weakref.finalize] = {}

    @property
    def peak(self) -> int:
        """Maximum of :attr:`live` since :meth:`begin`."""
        return max(self.peaks)

    def begin(self) -> int:
        """Forget earlier peaks and return :attr:`live`."""
        self.peaks = [self.live]
        return self.live

    def next_phase(self) -> None:
        """Start a new phase, which has its own peak."""
        self.peaks.append(self.live)

    def next_phases(self, tensor: Tensor) -> None:
        """Start a phase now, and another one when the backward pass has computed the tensor's gradient."""
        self.next_phase()
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.next_phase())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut: autograd calls this very often
        if func is _ITEM and isinstance(args[0], FakeTensor):
            # Initialisers resample until no value is out of range; False ("no value is") ends their loop.
            return False
        out = func(*args, **(kwargs or {}))
        self._add_tensors(out)
        return out

    def _add_tensors(self, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self._add(out.untyped_storage())
        elif isinstance(out, (tuple, list)):  # an operation with several results
            for item in out:
                self._add_tensors(item)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        finalizer = weakref.finalize(storage, self._remove, key, size)
        finalizer.atexit = False
        self._known[key] = finalizer
        self.live += size
        self.peaks[-1] = max(self.peaks[-1], self.live)

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class FakeTensors:
    """Context manager in which new tensors have shapes but no data; :attr:`counter` counts their storages.

    It can be entered repeatedly. Modules created inside have parameters without data and can only be used inside.
    """

    def __init__(self) -> None:
        self.counter = StorageCounter()
        self._mode = FakeTensorMode()

    def __enter__(self) -> StorageCounter:
        self._mode.__enter__()
        self.counter.__enter__()
        return self.counter

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.counter.__exit__(kind, error, trace)
        self._mode.__exit__(kind, error, trace)


class RealTensors:
    """Context manager in which the storages of real tensors are counted; it can be entered repeatedly.

    Random numbers that are drawn inside do not change those drawn outside. Operations run on one thread: a pool of
    threads would be lost in environments that are forked afterwards, and their first operation would wait for it.
    """

    def __init__(self) -> None:
        self.counter = StorageCounter()
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> StorageCounter:
        self._inside.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        self._inside.enter_context(torch.random.fork_rng(devices=[]))
        return self._inside.enter_context(self.counter)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.__exit__(kind, error, trace)


#: Updates of at most so many floating-point operations and evaluated rows are traced with real tensors. They take a
#: tenth of a second of one core, and up to some 60 MiB: ``flow_v3`` at ``tiny`` with ``pwm_paper`` is close to both
#: limits. Every configuration of ``5m`` is above the first.
SMALL_OPERATIONS, SMALL_ROWS = 5e9, 20_000


def is_small(cfg: Config, facts: EnvFacts) -> bool:
    """Whether every update of a run is small, judged by its widest layer.

    A user's own dynamics or algorithm, a simulator's step and a world model from a file never count as small, because
    the configuration does not contain their size.
    """
    algorithm, size = cfg.algorithm, cfg.size
    user_made = "." in algorithm.name or "." in cfg.model.dynamics.kind
    if user_made or cfg.mode == "extract" or find_algorithm(algorithm.name).simulates:
        return False
    networks = (size.units, size.encoder_units, size.actor_units, size.critic_units)
    inputs = size.latent_dim + facts.action_dim + size.task_dim * bool(facts.action_dims)
    width = max(facts.observation_dim, inputs, *(max(units, default=1) for units in networks))
    parameters = width * width * (1 + max(len(units) for units in networks))
    evaluations = evaluations_of(cfg)
    rows = [
        update.batch
        * update.steps
        * (size.num_critics if name == "critic" else evaluations[name].rows if name in evaluations else 1)
        for name, update in updates_of(cfg).items()
    ]
    return max(rows) <= SMALL_ROWS and 6.0 * parameters * max(rows) <= SMALL_OPERATIONS


#: Horizons traced in place of a longer one. The peak of a phase is linear in the horizon (a test checks this), except
#: for short horizons, from which extrapolations were up to 11 % too low. The usual horizon of 16 is traced directly.
TRACED_HORIZONS = (15, 16)


@dataclass(frozen=True)
class Persistent:
    """Bytes that live as long as the run."""

    parameters: int
    optimizer: int
    undo: int  # copies of weights and optimizer state, for undoing an unfinished update

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.optimizer + self.undo


@dataclass(frozen=True)
class Transient:
    """Memory of one update in addition to what persists, in bytes."""

    phases: tuple[int, ...]  # peak of each phase
    gradients: int  # part of the peak
    data: int  # part of the peak: the batch

    @property
    def peak(self) -> int:
        """Maximum over all phases."""
        return max(self.phases)

    def extended(self, longer: Transient, steps: float) -> Transient:
        """Linear extrapolation: this plus ``steps`` times the difference between ``longer`` and this."""

        def extend(here: int, there: int) -> int:
            return round(here + (there - here) * steps)

        phases = tuple(extend(*pair) for pair in zip(self.phases, longer.phases, strict=True))
        return Transient(phases, self.gradients, extend(self.data, longer.data))

    @property
    def activations(self) -> int:
        """Tensors saved by autograd, temporaries, and the rollout for the critic updates."""
        return max(0, self.peak - self.gradients - self.data)


class UpdateTracer:
    """Traces the updates of one configuration. Results are cached in the process, because plans reuse them.

    Args:
        cfg (Config): the run's configuration. A compiled loss is traced in eager mode.
        facts (EnvFacts): the environment's dimensions.
    """

    _persistent: ClassVar[dict[str, Persistent]] = {}
    _transient: ClassVar[dict[tuple[str, str, int], Transient]] = {}

    def __init__(self, cfg: Config, facts: EnvFacts) -> None:
        self.cfg = replace(cfg, algorithm=replace(cfg.algorithm, compile=False))
        self.facts = facts
        dimensions = (facts.observation_dim, facts.action_dim, facts.terminates, facts.action_dims)
        simulator = type(getattr(facts, "simulator", None)).__qualname__
        mode = (
            simulator,
            cfg.env.get("num_envs"),
            cfg.mode,
            cfg.finetune,
            cfg.world_model,
            cfg.world_model_sha256,
            cfg.task,
        )
        self.key = repr((self.cfg.model, self.cfg.size, self.cfg.algorithm, cfg.training.precision, dimensions, mode))
        #: The updates of an epoch.
        self.updates = updates_of(cfg)
        self._tensors = RealTensors() if is_small(self.cfg, facts) else FakeTensors()
        self._made: _Updates | None = None

    def _updates(self) -> _Updates:
        """The updates, built on first use; call this only inside the tracer's tensors."""
        if self._made is None:
            self._made = _Updates(self.cfg, self.facts, self._tensors.counter)
        return self._made

    @property
    def batches(self) -> dict[str, int]:
        """Rows of each update's batch."""
        return {name: update.batch for name, update in self.updates.items()}

    @property
    def allocated(self) -> int:
        """Bytes that the tracer itself holds in this process."""
        return self._tensors.counter.live if isinstance(self._tensors, RealTensors) else 0

    @property
    def persistent(self) -> Persistent:
        """Bytes of parameters, optimizer state and undo copies of all networks."""
        if self.key not in self._persistent:
            with self._tensors:
                self._persistent[self.key] = self._updates().persistent
        return self._persistent[self.key]

    @property
    def networks(self) -> list[str]:
        """Names of all networks, trained or not."""
        with self._tensors:
            return [name for name, _ in self._updates().networks.items()]

    @property
    def operations(self) -> float:
        """Floating-point operations of the updates per epoch."""
        with self._tensors:
            return operations_per_epoch(self.cfg, self._updates().networks)

    def transient(self, update: str, micro_batch: int | None = None) -> Transient:
        """Memory of one update with ``micro_batch`` rows per backward pass; ``None`` for the whole batch at once."""
        batch = self.batches[update]
        size = batch if micro_batch is None else min(micro_batch, batch)
        key = (self.key, update, size)
        if key not in self._transient:
            horizon = self.updates[update].steps
            if horizon <= TRACED_HORIZONS[1]:
                self._transient[key] = self._trace(update, batch, size, horizon)
            else:
                short, longer = (self._trace(update, batch, size, h) for h in TRACED_HORIZONS)
                self._transient[key] = short.extended(
                    longer, (horizon - TRACED_HORIZONS[0]) / (TRACED_HORIZONS[1] - TRACED_HORIZONS[0])
                )
        return self._transient[key]

    def _trace(self, update: str, batch: int, size: int, horizon: int) -> Transient:
        with self._tensors:
            return self._updates().measure(update, batch, size, horizon)


class _Updates:
    """The updates of a run; used only where ``counter`` counts, on fake tensors or real ones."""

    def __init__(self, cfg: Config, facts: EnvFacts, counter: StorageCounter) -> None:
        self.cfg, self.facts, self.counter = cfg, facts, counter
        self.algorithm = find_algorithm(cfg.algorithm.name)
        parts = build_parts(cfg, facts)
        self.networks, self.losses, self.optimizers = parts.networks, parts.losses, parts.optimizers
        tensors = [t for _, network in self.networks.items() for t in (*network.parameters(), *network.buffers())]
        parameters = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.undo = {name: Undo(optimizer) for name, optimizer in self.optimizers.items()}
        for name, optimizer in self.optimizers.items():
            for _ in range(2):  # the first step creates the optimizer's state, the second the undo copies of it
                for parameter in optimizer.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step(self.undo[name].before_step)
        moments = sum(
            value.untyped_storage().nbytes()
            for optimizer in self.optimizers.values()
            for state in optimizer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        self.persistent = Persistent(parameters, moments, counter.live - parameters - moments)
        # A new phase begins where memory starts to grow with the horizon at another rate: where the rollout is complete
        # (in the backward pass, the steps follow the values), and where the targets or the first observations are
        # encoded (the backward pass through the steps ends there).
        if self.networks.critic is not None:
            self.networks.critic.register_forward_pre_hook(lambda module, inputs: counter.next_phases(inputs[0]))
        if self.networks.model is not None:
            self.networks.model.encoder.register_forward_hook(lambda module, _, latent: counter.next_phases(latent))

    def measure(self, update: str, batch: int, size: int, horizon: int) -> Transient:
        """Run the last micro-batch of an update: ``size`` of ``batch`` rows, ``horizon`` steps."""
        run: dict[str, Callable[[int, int, int], Transient]] = {
            "model": self.model,
            "actor": self.actor,
            "critic": self.critic,
        }
        return run[update](batch, size, horizon)

    def _finish(self, name: str) -> None:
        """Run the optimizer's step in a phase of its own."""
        self.counter.next_phase()
        self.optimizers[name].step(self.undo[name].before_step)
        self.counter.next_phase()

    def _transient(self, name: str, before: int, data: int) -> Transient:
        gradients = sum(p.untyped_storage().nbytes() for p in self.optimizers[name].parameters)
        return Transient(tuple(peak - before for peak in self.counter.peaks), gradients, data)

    def _accumulated(self, name: str) -> list[Tensor]:
        """Gradients accumulated from earlier micro-batches."""
        return [torch.zeros_like(p) for p in self.optimizers[name].parameters]

    def _accumulate(self, name: str) -> None:
        for parameter, gradient in zip(self.optimizers[name].parameters, self._accumulated(name), strict=True):
            parameter.grad = gradient

    def model(self, batch: int, size: int, horizon: int) -> Transient:
        before = self.counter.begin()
        # Batch-major, as the replay returns it; the loss reads it time-major.
        sampled = self._slices(batch, horizon)  # stays alive next to the tensors that the loss reads, as in a run
        slices: Slices = self.losses.model.read(sampled)
        data = self.counter.live - before
        if size < batch:
            self._accumulate("model")
        self.losses.model.backward(slices.rows(slice(0, size)))
        self._finish("model")
        return self._transient("model", before, data)

    def _slices(self, batch: int, steps: int) -> TensorDict:
        """Slices in the form that the replay buffer returns: batch-major with all keys."""
        facts, shape = self.facts, [batch, steps]
        step = {
            "observation": torch.zeros(*shape, facts.observation_dim),
            "reward": torch.zeros(*shape, 1),
            "done": torch.zeros(*shape, 1, dtype=torch.bool),
            "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        }
        sampled = TensorDict(
            observation=torch.zeros(*shape, facts.observation_dim),
            action=torch.zeros(*shape, facts.action_dim),
            next=TensorDict(step, batch_size=shape),
            batch_size=shape,
        )
        if facts.action_dims:
            sampled["task"] = torch.zeros(*shape, dtype=torch.int64)
        return sampled

    def actor(self, batch: int, size: int, horizon: int) -> Transient:
        before = self.counter.begin()
        latent = self.algorithm.starts_like(self.cfg, self.facts, self.networks, batch)
        start = TensorDict(latent=latent, batch_size=[batch])
        given = self.counter.live
        earlier: Any = self._accumulated("actor") if size < batch else None
        held = self.counter.live
        self.losses.actor.horizon = horizon
        _, imagined = self.losses.actor.backward(start[:size])
        self._finish("actor")
        # The rollouts of earlier micro-batches stay alive; concatenating them copies all of them.
        each = (self.counter.live - held) // size
        used = self._transient("actor", before, batch * self.facts.observation_dim * 4)
        phases = [peak + each * (batch - size) for peak in used.phases]
        if size < batch:
            phases.append(given - before + 2 * each * batch)
        del earlier, imagined
        return replace(used, phases=tuple(phases))

    def critic(self, batch: int, size: int, steps: int) -> Transient:
        if issubclass(self.algorithm, PWM):
            return self._q_critic(batch, size)
        before = self.counter.begin()
        keys = self.losses.critic.tensor_keys
        # The rollout of the actor update stays alive during the critic updates.
        imagined = self._rollout()
        states = imagined.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()
        states[keys.latent] = self.algorithm.critic_input(self.cfg, self.facts, states[keys.latent])
        minibatch = states[torch.randperm(len(states))[:batch]]
        data = self.counter.live - before
        if size < batch:
            self._accumulate("critic")
        self.losses.critic.backward(minibatch[:size])
        self._finish("critic")
        return self._transient("critic", before, data)

    def _q_critic(self, batch: int, size: int) -> Transient:
        before = self.counter.begin()
        slices = self._slices(batch, self.cfg.algorithm.slice_length)
        networks, a = self.networks, self.cfg.algorithm
        states = q_targets(networks.model, networks.actor, networks.critic, slices, a.gamma, a.critic_steps)
        data = self.counter.live - before
        if size < batch:
            self._accumulate("critic")
        self.losses.critic.backward(states[:size])
        self._finish("critic")
        return self._transient("critic", before, data)

    def _rollout(self) -> TensorDictBase:
        """A detached rollout of an actor update, with the tensors that its loss returns."""
        actor = updates_of(self.cfg)["actor"]
        batch, horizon = actor.batch, actor.steps
        latent = self.algorithm.starts_like(self.cfg, self.facts, self.networks, 1)
        self.losses.actor.horizon = horizon
        rollout = Imagined(
            torch.zeros(horizon + 1, batch, latent.shape[-1]),
            tuple(torch.zeros(batch, self.facts.action_dim) for _ in range(horizon)),
            torch.zeros(horizon, batch, 1),
            torch.zeros(horizon, batch, 1, dtype=torch.bool),
        )
        return self.losses.actor.detached(rollout, torch.zeros(horizon, batch, 1))
