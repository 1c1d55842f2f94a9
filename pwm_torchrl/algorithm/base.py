"""What the algorithms share: how they are found, their data, the model's update, and the state of an unfinished epoch.

``algorithm.name`` names a class of :data:`~pwm_torchrl.config.ALGORITHMS`, or one of the user's own by its dotted path.
What the rest of the program must know of it, it asks that class: which updates an epoch makes, and of what networks and
losses they consist. Memory plan, run length, checkpoints and recovery follow from the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.build import (
    EnvFacts,
    Losses,
    NetworkOptimizer,
    Networks,
    build_losses,
    build_networks,
    build_optimizers,
)
from pwm_torchrl.algorithm.updates import Updates
from pwm_torchrl.config import ALGORITHMS, AlgorithmConfig, Config, micro_batch_key
from pwm_torchrl.devices import to_device
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import RewardScale
from pwm_torchrl.modules.dynamics import dynamics_class
from pwm_torchrl.user_code import locate

__all__ = [
    "Algorithm",
    "EpochWork",
    "MetricRow",
    "Number",
    "Parts",
    "Samples",
    "Update",
    "build_parts",
    "find_algorithm",
    "pays_to_compile",
    "updates_of",
]

# The metrics of an epoch: detached numbers ----------------------------------------------------------------------------

Number = int | float


class MetricRow:
    """One row of metrics while an epoch fills it.

    :meth:`set` keeps the last value, :meth:`mean` averages over the calls. Tensors stay on their device until
    :meth:`numbers`, so that collecting does not wait for the accelerator at every update.

    Nothing that outlives a step may own an autograd graph: a logged loss that kept its graph once cost a run 128 GB of
    host memory. A tensor that requires grad is therefore refused here instead of being detached in silence.

    Examples:
        >>> from pwm_torchrl.algorithm.base import MetricRow
        >>> row = MetricRow()
        >>> row.set({"epoch": 3})
        >>> for loss in (1.0, 3.0):
        ...     row.mean({"model": loss}, prefix="loss/")
        >>> row.numbers()
        {'epoch': 3, 'loss/model': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def set(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Stores values, replacing earlier ones of the same name.

        Args:
            values: numbers or tensors with one element and no gradient; a TensorDict of such works too.
            prefix: put in front of each name. Defaults to ``""``.

        Raises:
            ValueError: if a tensor requires grad or has more than one element.
            TypeError: if a value is not a number.
        """
        for name, value in values.items():
            key = prefix + name
            self._sums[key] = _check(key, value)
            self._counts[key] = 1

    def mean(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds values to the running mean of their names; takes and raises what :meth:`set` does."""
        for name, value in values.items():
            key = prefix + name
            checked = _check(key, value)
            self._sums[key] = self._sums[key] + checked if key in self._sums else checked
            self._counts[key] = self._counts.get(key, 0) + 1

    def numbers(self) -> dict[str, Number]:
        """The row as plain Python numbers, in the order in which the names appeared."""
        totals = _on_host(self._sums)
        return {key: total if self._counts[key] == 1 else total / self._counts[key] for key, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """The row as far as it is filled, to the bit."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], device: Any = None) -> MetricRow:
        """A row as :meth:`state_dict` gave it, its tensors on ``device``."""
        row = cls()
        row._sums = {
            k: v.to(device) if isinstance(v, Tensor) and device is not None else v
            for k, v in state_dict["sums"].items()
        }
        row._counts = dict(state_dict["counts"])
        return row


def _check(name: str, value: Any) -> Any:
    """The value itself, or its detached tensor, after refusing what must not be kept."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"metric {name!r} requires grad and would keep its autograd graph alive; detach it where it is made"
            )
        if value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a metric is one number")
        # A copy: the caller may overwrite its tensor in place before the row is read.
        return value.reshape(()).clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}; a metric is one number")
    return int(value) if isinstance(value, Integral) else float(value)


def _on_host(values: Mapping[str, Any]) -> dict[str, Number]:
    """Values as Python numbers; the tensors of a device and dtype are copied together, since each copy waits."""
    together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            together.setdefault((value.device, value.dtype), []).append(key)
    numbers = dict(values)
    for keys in together.values():
        numbers.update(zip(keys, torch.stack([values[key] for key in keys]).cpu().tolist(), strict=True))
    return numbers


# The algorithms: their data, an epoch's work, and the class that each of them is --------------------------------------

Work = TypeVar("Work", bound="EpochWork")


class Samples(Protocol):
    """What updates draw from: a replay, or stored episodes."""

    @property
    def device(self) -> torch.device:
        """Of what is drawn."""

    @property
    def collected(self) -> int:
        """Transitions that were ever stored."""

    @property
    def can_sample(self) -> bool:
        """Whether there is a whole slice."""

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, T]``."""

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``."""


Phase = Callable[[str, int, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Update:
    """One of an epoch's updates, under the name of the network that it trains.

    That name is the one word for it everywhere: keys ``algorithm.{name}_lr`` and ``memory.{name}_micro_batch``, losses,
    optimizers, metrics ``loss/{name}``, checkpoints and messages.

    Attributes:
        name (str): one of :data:`~pwm_torchrl.config.NETWORKS`.
        rows (str): what a batch consists of.
        batch (int): rows of a batch.
        per_epoch (int): updates in an epoch; at most, where the number varies.
        steps (int): steps through which a row is rolled out and differentiated.
    """

    name: str
    rows: str
    batch: int
    per_epoch: int
    steps: int = 1

    @property
    def micro_batch_key(self) -> str:
        """The field of :class:`~pwm_torchrl.config.MemoryConfig` that sets its micro-batch."""
        return micro_batch_key(self.name)


@contextmanager
def _no_phase(name: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass
class EpochWork:
    """What is left of an epoch's updates, and their metrics so far: an epoch that is stopped inside goes on with it.

    Attributes:
        model_updates (int): model updates left before the others begin.
        row (MetricRow): metrics.
    """

    model_updates: int
    row: MetricRow = field(default_factory=MetricRow, kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Counters and tensors."""
        return {**vars(self), "row": self.row.state_dict()}

    @classmethod
    def restored(cls: type[Work], state_dict: Mapping[str, Any], device: torch.device) -> Work:
        """Work as :meth:`state_dict` gave it, its tensors on ``device``."""
        return cls(**{**state_dict, "row": MetricRow.restored(state_dict["row"], device)})


class Algorithm:
    """The updates of an epoch; a subclass says which, and in which order, in :meth:`epoch`.

    Args:
        cfg (AlgorithmConfig): numbers of updates and sizes of batches.
        networks (Networks): what is trained.
        losses (Losses): the objectives around ``networks``.
        optimizers (dict of NetworkOptimizer): of the networks that are trained; the updates of others are left out.
        samples (Samples): source of slices and start states; an algorithm that simulates has others.
        updates (Updates): carries out single updates.

    Keyword Args:
        reward_scale (RewardScale, optional): divides rewards before the model sees them. Defaults to ``None``.
        first_model_updates (int, optional): model updates of the first epoch that has any. Defaults to ``None``:
            ``cfg.model_updates``.
        stored (bool): whether the data are there from the beginning; else epochs pass without updates until
            ``cfg.random_steps`` transitions and a whole slice are collected. Defaults to ``False``.
        between (callable, optional): called between two updates; what it raises leaves the epoch at a place where
            :meth:`epoch` goes on when it is called again. Defaults to ``None``.
        phase (callable, optional): ``phase(name, total, done)`` is entered around updates of one kind, for a progress
            display, and gives a function that counts one. Defaults to ``None``.

    Attributes:
        work (EpochWork, optional): what is left of an epoch that has begun.
        started (bool): whether the first updates have been made.
    """

    work_type: ClassVar[type[EpochWork]] = EpochWork

    #: Whether the updates step a differentiable environment: nothing is collected, and there is no world model.
    simulates: ClassVar[bool] = False
    #: Keys of :class:`~pwm_torchrl.config.AlgorithmConfig` that mean nothing to it; one that is set is refused.
    ignored: ClassVar[tuple[str, ...]] = ()

    # What others ask the class ----------------------------------------------------------------------------------------

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """The updates of an epoch, in their order, of a run of any mode; their networks are those that it trains."""
        raise NotImplementedError

    @classmethod
    def build_networks(cls, cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
        """The networks, trained or not, on ``device``."""
        return build_networks(cfg, facts, device)

    @classmethod
    def build_losses(cls, cfg: Config, facts: EnvFacts, networks: Networks) -> Losses:
        """The losses of the networks that are there; they share the networks' parameters."""
        return build_losses(cfg, networks)

    @classmethod
    @torch.no_grad()
    def starts_like(cls, cfg: Config, facts: EnvFacts, networks: Networks, count: int) -> Tensor:
        """Latents ``[count, D]`` such as its actor updates start from, for predictions of memory."""
        return networks.model.encode(torch.empty(count, facts.observation_dim))

    @classmethod
    def critic_input(cls, cfg: Config, facts: EnvFacts, latent: Tensor) -> Tensor:
        """What the critics are updated on, of latents ``[S, D]``."""
        return latent

    # An instance ------------------------------------------------------------------------------------------------------

    def __init__(
        self,
        cfg: AlgorithmConfig,
        networks: Networks,
        losses: Losses,
        optimizers: Mapping[str, NetworkOptimizer],
        samples: Any,
        updates: Updates,
        *,
        reward_scale: RewardScale | None = None,
        first_model_updates: int | None = None,
        stored: bool = False,
        between: Callable[[], None] | None = None,
        phase: Phase | None = None,
    ) -> None:
        self.cfg, self.networks, self.losses, self.optimizers = cfg, networks, losses, optimizers
        self.samples, self.updates, self.reward_scale = samples, updates, reward_scale
        self.first_model_updates = cfg.model_updates if first_model_updates is None else first_model_updates
        self.stored = stored
        self.between = between or (lambda: None)
        self.phase = phase or _no_phase
        self.work: Any = None
        self.started = False

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """One epoch's updates.

        Args:
            batch (TensorDictBase): what was just collected, ``[N, T]``; it is in ``samples`` already.
            progress (float): how much of the training is done, from 0 to 1, for the learning rates.

        Returns:
            MetricRow: means over the epoch; empty while too little is collected for updates.
        """
        raise NotImplementedError

    def set_rates(self, progress: float, row: MetricRow) -> None:
        """Set the learning rates of this part of the training."""
        for name, optimizer in self.optimizers.items():
            row.set({f"lr/{name}": optimizer.set_progress(progress)})

    def update_model(self, row: MetricRow) -> None:
        """One model update on replayed slices: L = (L_dyn + L_rew) / H over z_{t+1} = d(z_t, a_t), z_0 = h(o_0)."""
        count = self.cfg.model_batch
        losses, valid, norm = self.updates.model(lambda: self.sample_slices(count), count)
        row.mean({"loss/model": torch.stack(list(losses.values())).sum()})
        row.mean({key.replace("loss_", "loss/model_"): value for key, value in losses.items()})
        row.mean({"grad_norm/model": norm, "data/valid_fraction": valid})

    # What the updates start from --------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether enough is collected for updates."""
        enough = self.samples.collected >= self.cfg.random_steps and self.samples.can_sample
        return self.stored or enough

    def sample_slices(self, count: int) -> TensorDictBase:
        """Replayed slices ``[count, T]``, rewards scaled."""
        return self.scaled(self.samples.sample_slices(count))

    def scaled(self, slices: TensorDictBase) -> TensorDictBase:
        """Slices whose rewards are as the model learns them; changes and returns what is given."""
        if self.reward_scale is not None:
            slices["next", "reward"] = self.reward_scale(slices["next", "reward"])
        return slices

    @torch.no_grad()
    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """Observations ``[actor_batch, O]`` from which to imagine, replayed or of this epoch's batch."""
        count = self.cfg.actor_batch
        if self.cfg.actor_starts == "replay":
            return self.samples.sample_observations(count)
        current = batch.get("observation").flatten(0, 1)
        rows = torch.randperm(len(current), device=current.device)[:count]
        return to_device(current[rows], self.samples.device)

    def sample_starts(self, count: int) -> Tensor:
        """Observations ``[count, O]`` to imagine from, for a look at gradients."""
        return self.samples.sample_observations(count)

    def encode(self, observation: Tensor) -> TensorDictBase:
        """Start latents ``[B]``, without gradient."""
        with torch.no_grad():
            latent = self.networks.model.encode(observation)
        return TensorDict(latent=latent, batch_size=latent.shape[:1])

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Reduced micro-batches and unfinished work; networks and optimizers are components of their own."""
        return {
            "started": self.started,
            "updates": self.updates.state_dict(),
            "work": None if self.work is None else self.work.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.started = bool(state_dict["started"])
        self.updates.load_state_dict(state_dict["updates"])
        work = state_dict["work"]
        self.work = None if work is None else self.work_type.restored(work, self.samples.device)


# Which algorithm a run has --------------------------------------------------------------------------------------------


def find_algorithm(name: str) -> type[Algorithm]:
    """The class that trains.

    Args:
        name (str): ``algorithm.name``: one of :data:`~pwm_torchrl.config.ALGORITHMS`, or the dotted path of a subclass
            of :class:`Algorithm`.

    Raises:
        ConfigurationError: if it is neither.
    """
    path = ALGORITHMS.get(name, name)
    found = locate("algorithm.name", path)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigurationError(
            f"algorithm.name={name} is a {type(found).__name__} and not a subclass of "
            "pwm_torchrl.algorithm.base.Algorithm"
        )
    return found


def updates_of(cfg: Config) -> dict[str, Update]:
    """The updates of a run's epochs, by the networks that they train."""
    return {update.name: update for update in find_algorithm(cfg.algorithm.name).updates_of(cfg)}


@dataclass
class Parts:
    """What a run computes with."""

    networks: Networks
    losses: Losses
    optimizers: dict[str, NetworkOptimizer]


def build_parts(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Parts:
    """Networks, losses and optimizers of a run of any algorithm and mode."""
    algorithm = find_algorithm(cfg.algorithm.name)
    _check_ignored(cfg, algorithm)
    networks = algorithm.build_networks(cfg, facts, device)
    return Parts(networks, algorithm.build_losses(cfg, facts, networks), build_optimizers(cfg, networks))


def _check_ignored(cfg: Config, algorithm: type[Algorithm]) -> None:
    default = AlgorithmConfig()
    for key in algorithm.ignored:
        value = getattr(cfg.algorithm, key)
        if value != getattr(default, key):
            raise ConfigurationError(
                f"algorithm.{key}={value} means nothing to algorithm={cfg.algorithm.name}; leave it at "
                f"{getattr(default, key)}"
            )


#: Evaluations of the dynamics' network, with their gradients, from which a run is compiled. Measured in CPU time, one
#: thread, AVX-512: a compiled one takes 0.14 ms less of 1.05 at ``tiny`` and 1.1 ms less of 21.5 at ``5m`` (flow_v2,
#: float32). Compiling takes up to two minutes of a busy machine the first time, and 2 s with a filled cache.
COMPILE_FROM = 500_000


def pays_to_compile(cfg: Config) -> bool:
    """Whether a run on a CPU is long enough for ``algorithm.compile=auto``. On a GPU it was not measured: it is not."""
    if find_algorithm(cfg.algorithm.name).simulates:
        return False
    d, updates = cfg.model.dynamics, updates_of(cfg)
    evaluations = dynamics_class(d.kind, d.parameterization).evaluations_with(d.solver, d.substeps)
    imagined = d.imagination_substeps or evaluations
    each = {"model": 1 + imagined if cfg.model.loss.few_step_rollout else evaluations, "actor": imagined}
    made = sum(updates[name].per_epoch * updates[name].steps * each[name] for name in each if name in updates)
    return cfg.device in ("auto", "cpu") and cfg.training.epochs * made >= COMPILE_FROM
